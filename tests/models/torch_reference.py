"""Tiny UNets of both kinds of stage, built in diffusers with every parameter random, and the same weights for ours."""

from __future__ import annotations

from functools import cache
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from if_jax.checkpoints.names import lazy_from_torch, unet_config_to_diffusers
from if_jax.checkpoints.weights import load_params
from if_jax.models.presets import SCALE
from if_jax.models.unet import UNet, UNetConfig

_SHARED = {
    "cross_attention_dim": 64,
    "encoder_hid_dim": 24,
    "attention_head_dim": 8,
    "addition_embed_type_num_heads": 3,
    "norm_num_groups": 8,
}
CONFIGS = {
    "base": UNetConfig(8, (16, 32), (1, 2), (False, True), **_SHARED),
    "super-resolution": UNetConfig(
        16,
        (16, 32, 48),
        (1, 2, 1),
        (False, False, True),
        in_channels=6,
        time_embedding_dim=48,
        aug_level_embedding=True,
        time_embedding_act=True,
        resnet_skip_time_act=True,
        resnet_out_scale_factor=SCALE,
        mid_block_scale_factor=SCALE,
        **_SHARED,
    ),
    # What no released stage has: text alone in attention, attention at the full resolution, another eps, two scales.
    "cross-only": UNetConfig(
        4,
        (32, 64),
        (1, 1),
        (True, False),
        cross_attention_dim=32,
        encoder_hid_dim=16,
        attention_head_dim=16,
        addition_embed_type_num_heads=2,
        norm_eps=1e-3,
        resnet_out_scale_factor=1.25,
        mid_block_scale_factor=1.5,
        only_cross_attention=True,
    ),
}
LENGTH = 11


@cache
def torch_unet(kind: str) -> Any:
    """diffusers' net in evaluation mode; norms and biases, which start at one and zero, are moved off them."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.set_num_threads(1)  # tiny nets: a second thread only waits
    torch.manual_seed(0)
    net = UNet2DConditionModel.from_config(unet_config_to_diffusers(CONFIGS[kind])).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return net


@cache
def unet_params(kind: str) -> dict[str, Any]:
    """The weights of `torch_unet(kind)` as our parameters."""
    state = {name: tensor.numpy() for name, tensor in torch_unet(kind).state_dict().items()}
    return load_params(lazy_from_torch(state, abstract_params(CONFIGS[kind]), "unet"))


def abstract_params(config: UNetConfig) -> dict[str, Any]:
    """Shapes of all parameters; nothing is allocated."""
    net = UNet(config)
    return nn.meta.unbox(jax.eval_shape(net.init, jax.random.key(0), *unet_inputs(config, 1)))["params"]


def unet_inputs(
    config: UNetConfig, batch: int = 2, size: tuple[int, int] | None = None
) -> tuple[np.ndarray | None, ...]:
    """(x_t, t, text_states, aug_level) from a fixed seed."""
    rng = np.random.default_rng(0)
    height, width = size or (config.sample_size, config.sample_size)
    x_t = rng.normal(size=(batch, height, width, config.in_channels)).astype(np.float32)
    t = np.linspace(999, 3, batch).astype(np.int32)
    text = rng.normal(size=(batch, LENGTH, config.encoder_hid_dim)).astype(np.float32)
    aug_level = np.linspace(0, 250, batch).astype(np.int32) if config.aug_level_embedding else None
    return x_t, t, text, aug_level


def to_nchw(x: np.ndarray) -> Any:
    """NHWC array -> NCHW tensor."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


def to_nhwc(x: Any) -> np.ndarray:
    """NCHW tensor -> NHWC array."""
    return np.moveaxis(x.detach().numpy(), 1, -1)


def relative_error(ours: Any, reference: np.ndarray) -> float:
    """Largest difference over the largest reference value."""
    ours = np.asarray(ours)
    assert ours.shape == reference.shape
    return float(np.abs(ours - reference).max() / np.abs(reference).max())
