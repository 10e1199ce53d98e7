"""Weights with which a super-resolution UNet that predicts x0 begins as a copy of its low-resolution input.

A net that starts at random spends most of a short training on learning to hand that input through. Here its outermost
skip does so from the start: `conv_in` keeps the three channels, the last residual block's shortcut lays each of them
into a group of the output norm as

    (c, −c, K, −K, 0, …),

whose mean is 0 and whose variance hardly depends on the picture for a large constant K, and `conv_out` takes
gelu(c) − gelu(−c) = c. All other weights stay random, so that every gradient is there; the residual branches add what
the copy lacks.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from if_jax.models.unet import UNetConfig

_CONSTANT = 8.0  # K; the picture's own mean square, 0 to 1 of the variance's K² + 1, changes the contrast by under 1 %
_MEAN_SQUARE = 0.3  # of a picture in [-1, 1]: about that of photographs


def check_copy(config: UNetConfig) -> None:
    """Refuses a net that cannot start as a copy.

    Raises:
      ValueError: it is a base stage's, or its outermost level has fewer than three groups of four channels.
    """
    width, groups = config.block_out_channels[0], config.norm_num_groups
    if not config.aug_level_embedding:
        raise ValueError("a base stage has no low-resolution input to copy")
    if groups < 3 or width // groups < 4:
        raise ValueError(
            f"block_out_channels[0]={width} in norm_num_groups={groups}: a copy needs three groups of four channels"
        )


def start_by_copying(params: dict[str, Any], config: UNetConfig) -> dict[str, Any]:
    """Sets what the copy needs.

    Args:
      params: random parameters of the UNet, unboxed.
      config: of a super-resolution UNet.

    Returns:
      The same tree with changed leaves: at any step the net's first three output channels are the low-resolution
      channels of its input (3 to 5), its variance channels 0.

    Raises:
      ValueError: see `check_copy`.
    """
    check_copy(config)
    width, size = config.block_out_channels[0], config.block_out_channels[0] // config.norm_num_groups
    last_level = f"up_blocks_{len(config.block_out_channels) - 1}"
    last_block = f"resnets_{config.layers_per_block[0]}"
    kernel = params["conv_in"]["kernel"]
    shortcut = params[last_level][last_block]["conv_shortcut"]
    mix, constants = shortcut["kernel"], jnp.zeros_like(shortcut["bias"])
    head, gain = jnp.zeros_like(params["conv_out"]["kernel"]), params["conv_norm_out"]["scale"]
    mix = mix.at[..., : 3 * size].set(0)
    skip = mix.shape[-2] - width  # conv_in's channels come after those of the block before
    for colour in range(3):
        kernel = kernel.at[..., colour].set(0).at[1, 1, 3 + colour, colour].set(1)
        plus, minus, high, low = range(colour * size, colour * size + 4)
        scale = config.resnet_out_scale_factor
        mix = mix.at[0, 0, skip + colour, plus].set(scale).at[0, 0, skip + colour, minus].set(-scale)
        constants = constants.at[high].set(_CONSTANT * scale).at[low].set(-_CONSTANT * scale)
        gain = gain.at[jnp.array([plus, minus])].set((2 * (_MEAN_SQUARE + _CONSTANT**2) / size) ** 0.5)
        head = head.at[1, 1, plus, colour].set(1).at[1, 1, minus, colour].set(-1)
    changed = {
        "conv_in": {"kernel": kernel, "bias": jnp.zeros_like(params["conv_in"]["bias"])},
        "conv_norm_out": {**params["conv_norm_out"], "scale": gain},
        "conv_out": {"kernel": head, "bias": jnp.zeros_like(params["conv_out"]["bias"])},
    }
    block = {**params[last_level][last_block], "conv_shortcut": {"kernel": mix, "bias": constants}}
    return {**params, **changed, last_level: {**params[last_level], last_block: block}}
