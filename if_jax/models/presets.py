"""The zoo as two tables: IF's UNets, the T5 v1.1 encoders, and the small nets that ship with the package.

Sizes of the IF stages follow the published diffusers configurations; those of IF-II-M disagree with its rounded
parameter count, and IF-III-L was never released: its row is the smallest guess that fits its layers and 700M.
"""

from __future__ import annotations

from typing import Any

from if_jax.models.t5 import T5Config
from if_jax.models.unet import UNetConfig

# IF multiplies by 0.7071, which is not 1/sqrt(2): the difference compounds over the blocks.
SCALE = 1 / 0.7071


def _widths(base: int, *multipliers: int) -> tuple[int, ...]:
    return tuple(base * m for m in multipliers)


def _unet(size: int, widths: tuple[int, ...], layers: tuple[int, ...], attended: int, **other: Any) -> UNetConfig:
    """A base stage; the `attended` deepest levels attend, and text is projected to the width of the deepest."""
    levels = len(widths)
    settings = {"cross_attention_dim": widths[-1], "encoder_hid_dim": 4096, **other}
    return UNetConfig(size, widths, layers, tuple(i >= levels - attended for i in range(levels)), **settings)


def _sr_unet(size: int, widths: tuple[int, ...], layers: tuple[int, ...], attended: int, **other: Any) -> UNetConfig:
    """A super-resolution stage: it sees the low-resolution image and its noise level, and scales its residual sums."""
    settings = {
        "in_channels": 6,
        "time_embedding_dim": widths[-1],
        "aug_level_embedding": True,
        "time_embedding_act": True,
        "resnet_skip_time_act": True,
        "resnet_out_scale_factor": SCALE,
        "mid_block_scale_factor": SCALE,
    }
    return _unet(size, widths, layers, attended, **settings, **other)


_DEMO = {
    "attention_head_dim": 32,
    "cross_attention_dim": 128,
    "encoder_hid_dim": 128,
    "addition_embed_type_num_heads": 4,
    "norm_num_groups": 8,
}
_DEMO_SR = {**_DEMO, "norm_num_groups": 4}  # groups of fewer channels take a picture's brightness away
_DEMO_LARGE = {**_DEMO_SR, "norm_num_groups": 3, "only_cross_attention": True}  # self-attention grows with the side

# fmt: off
UNETS: dict[str, UNetConfig] = {
    #                        size  widths                           layers               attended levels
    "IF-I-M":   _unet(         64, _widths(192, 1, 2, 3, 4),        (3, 3, 3, 3),        3),
    "IF-I-L":   _unet(         64, _widths(320, 1, 2, 3, 4),        (3, 3, 3, 3),        3),
    "IF-I-XL":  _unet(         64, _widths(704, 1, 2, 3, 4),        (3, 3, 3, 3),        3),
    "IF-II-M":  _sr_unet(     256, _widths(128, 1, 2, 4, 6, 6),     (2, 2, 3, 4, 4),     2),
    "IF-II-L":  _sr_unet(     256, _widths(160, 1, 2, 4, 6, 8),     (2, 2, 3, 5, 5),     2),
    "IF-III-L": _sr_unet(    1024, _widths(128, 1, 2, 2, 4, 6, 8),  (2, 2, 3, 3, 4, 4),  1),
    # Channels in multiples of 256, which fill a TPU's matrix unit, about as many parameters: not IF's own nets.
    "IF-I-M-tpu":  _unet(      64, (256, 512, 768, 1024),           (3, 3, 3, 3),        3),
    "IF-I-L-tpu":  _unet(      64, (256, 768, 1024, 1280),          (3, 3, 3, 3),        3),
    "IF-I-XL-tpu": _unet(      64, (768, 1536, 2048, 2816),         (3, 3, 3, 3),        3),
    "IF-II-L-tpu": _sr_unet(  256, (256, 256, 768, 1024, 1280),     (2, 2, 3, 5, 5),     2),
    "demo-I":   _unet(         64, (32, 64, 128, 160),              (1, 2, 3, 3),        2, **_DEMO),
    "demo-II":  _sr_unet(     256, (16, 32, 64, 96, 96),            (1, 1, 1, 2, 2),     1, **_DEMO_SR),
    "demo-III": _sr_unet(    1024, (12, 24, 48, 96, 96, 96),        (1, 1, 1, 1, 1, 1),  1, **_DEMO_LARGE),
}

T5_ENCODERS: dict[str, T5Config] = {
    #                          vocab  d_model  d_kv   d_ff  layers  heads
    "t5-v1_1-small":  T5Config(32128,     512,   64,  1024,      8,     6),
    "t5-v1_1-base":   T5Config(32128,     768,   64,  2048,     12,    12),
    "t5-v1_1-large":  T5Config(32128,    1024,   64,  2816,     24,    16),
    "t5-v1_1-xl":     T5Config(32128,    2048,   64,  5120,     24,    32),
    "t5-v1_1-xxl":    T5Config(32128,    4096,   64, 10240,     24,    64),
    "demo":           T5Config(  384,     128,   32,   256,      3,     4),  # bytes in, as ByT5
}
# fmt: on
