"""Floating-point operations of a forward pass, from the configuration alone.

Counted are 2 * (multiply-adds) of convolutions (all taps, edges included), linear layers and the two products of
attention; norms, activations and softmax are not. A training step costs three times as much.
"""

from __future__ import annotations

from if_jax.models.t5 import T5Config
from if_jax.models.unet import UNetConfig


def unet_flops(config: UNetConfig, size: int | tuple[int, int], text_length: int = 77) -> int:
    """FLOPs per sample of `UNet`.

    Args:
      config: of the UNet.
      size: side of a square image, or (height, width).
      text_length: tokens.

    Raises:
      ValueError: when the size does not fit the number of levels.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height % config.size_multiple or width % config.size_multiple:
        raise ValueError(f"image of {height}x{width}: both sides must be multiples of {config.size_multiple}")
    c, last = config, len(config.block_out_channels) - 1
    pixels = [height * width // 4**i for i in range(last + 1)]  # of each level
    total = _embedding_flops(c, text_length) + 9 * pixels[0] * c.in_channels * c.block_out_channels[0]
    current, skips = c.block_out_channels[0], [c.block_out_channels[0]]
    for i, out in enumerate(c.block_out_channels):
        for _ in range(c.layers_per_block[i]):
            total += _res_block_flops(c, current, out, pixels[i])
            total += c.attention_levels[i] * _attention_flops(c, out, pixels[i], text_length)
            current = out
            skips.append(out)
        if i < last:
            total += _res_block_flops(c, out, out, pixels[i + 1])
            skips.append(out)
    total += 2 * _res_block_flops(c, current, current, pixels[last])
    total += _attention_flops(c, current, pixels[last], text_length)
    for i in range(last, -1, -1):
        out = c.block_out_channels[i]
        for _ in range(c.layers_per_block[i] + 1):
            total += _res_block_flops(c, current + skips.pop(), out, pixels[i])
            total += c.attention_levels[i] * _attention_flops(c, out, pixels[i], text_length)
            current = out
        if i > 0:
            total += _res_block_flops(c, out, out, pixels[i - 1])
    return 2 * (total + 9 * pixels[0] * current * c.out_channels)


def t5_flops(config: T5Config, length: int = 77) -> int:
    """FLOPs per caption of `T5Encoder` on `length` tokens."""
    c = config
    inner = c.num_heads * c.d_kv
    per_token = 4 * c.d_model * inner + 3 * c.d_model * c.d_ff + 2 * length * inner
    return 2 * c.num_layers * length * per_token


def _embedding_flops(c: UNetConfig, text_length: int) -> int:
    """Multiply-adds of everything that is not at image resolution: steps, pooled text, projected text."""
    step = c.block_out_channels[0] * c.time_dim + c.time_dim**2
    hid = c.encoder_hid_dim
    # Query of the mean token, keys and values of it and the text, both products of the pooling, projection.
    pool = hid**2 + 2 * (text_length + 1) * hid**2 + 2 * (text_length + 1) * hid + hid * c.time_dim
    return (1 + c.aug_level_embedding) * step + pool + text_length * hid * c.cross_attention_dim


def _res_block_flops(c: UNetConfig, features_in: int, features: int, pixels: int) -> int:
    """Multiply-adds of a residual block whose convolutions run at `pixels`."""
    shortcut = features_in * features if features_in != features else 0
    return pixels * (9 * features_in * features + 9 * features**2 + shortcut) + 2 * c.time_dim * features


def _attention_flops(c: UNetConfig, features: int, pixels: int, text_length: int) -> int:
    """Multiply-adds of an attention block: projections of image and text, then both products."""
    own = 0 if c.only_cross_attention else 1
    projections = pixels * (2 + 2 * own) * features**2 + 2 * text_length * c.cross_attention_dim * features
    return projections + 2 * pixels * (text_length + own * pixels) * features
