"""The distinct blocks that a recipe's networks are made of, and how often each runs in a step.

A whole UNet takes the TPU compiler a quarter of an hour, yet is some thirty different blocks, most of them used several
times. Each is planned once, at its own shapes; the sum over them, times how often they run, stands for the network.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from if_jax.models.t5 import T5Config
from if_jax.models.unet import UNetConfig

BlockKind = Literal["residual", "attention", "embedding", "ends", "text"]
# What is computed: the forward pass; with all gradients; or, of frozen weights, with the gradients of what comes in.
Work = Literal["forward", "train", "inputs"]


@dataclass(frozen=True)
class Block:
    """One piece of a network at one shape: all that its compiled program follows from."""

    kind: BlockKind
    rows: int  # pictures at a time on one core
    work: Work
    dtype: str
    remat: str  # see `Recipe.remat`
    sizes: tuple[tuple[str, Any], ...]  # what the kind needs besides, by name, see `if_jax.planning.programs`

    def __getitem__(self, name: str) -> Any:
        """One of the sizes."""
        return dict(self.sizes)[name]

    def label(self) -> str:
        """What a reader knows it by."""
        size = dict(self.sizes)
        match self.kind:
            case "residual":
                before = f"{size['features_in']}" + (f"+{size['skip']}" if size["skip"] else "")
                way = {"none": "", "up": ", up", "down": ", down"}[size["resample"]]
                return f"residual {before} → {size['features']} at {size['height']}×{size['width']}{way}"
            case "attention":
                return f"attention {size['features']} at {size['height']}×{size['width']}"
            case "embedding":
                return "step and text embedding"
            case "ends":
                return f"first and last convolution at {size['height']}×{size['width']}"
            case "text":
                return f"text encoder layer {size['d_model']}"


@dataclass(frozen=True)
class PassSettings:
    """How a network's blocks are computed."""

    rows: int
    work: Work
    dtype: str
    remat: str = "none"
    text_length: int = 77


def unet_blocks(config: UNetConfig, size: tuple[int, int], settings: PassSettings) -> Counter[Block]:
    """The distinct blocks of a UNet and how often each runs in one pass.

    Args:
      config: of the UNet.
      size: height and width of the pictures.
      settings: how they are computed.
    """
    return Counter(_walk(config, size, settings))


def t5_blocks(config: T5Config, settings: PassSettings) -> Counter[Block]:
    """The layer of a T5 encoder and how often it runs; the first one's position bias is not counted.

    Args:
      config: of the encoder.
      settings: how it is computed.
    """
    sizes = dataclasses.asdict(config) | {"num_layers": 1, "vocab_size": 1, "length": settings.text_length}
    return Counter({_block("text", settings, sizes): config.num_layers})


def _block(kind: BlockKind, settings: PassSettings, sizes: dict[str, Any]) -> Block:
    remat = settings.remat if kind in ("residual", "attention") and settings.work != "forward" else "none"
    return Block(kind, settings.rows, settings.work, settings.dtype, remat, tuple(sorted(sizes.items())))


def _walk(c: UNetConfig, size: tuple[int, int], settings: PassSettings) -> Iterator[Block]:
    """Every block in the order it runs, as `UNet` puts them together."""
    last = len(c.block_out_channels) - 1

    def residual(level: int, before: int, features: int, scale: float, skip: int = 0, way: str = "none") -> Block:
        sizes = {
            **{"height": size[0] >> level, "width": size[1] >> level, "features_in": before, "skip": skip},
            **{"features": features, "out_scale": scale, "resample": way, "time_dim": c.time_dim},
            **{"groups": c.norm_num_groups, "eps": c.norm_eps, "skip_time_act": c.resnet_skip_time_act},
        }
        return _block("residual", settings, sizes)

    def attention(level: int, features: int) -> Block:
        sizes = {
            **{"height": size[0] >> level, "width": size[1] >> level, "features": features},
            **{"head_dim": c.attention_head_dim, "groups": c.norm_num_groups, "text_dim": c.cross_attention_dim},
            **{"text_length": settings.text_length, "only_cross": c.only_cross_attention},
        }
        return _block("attention", settings, sizes)

    whole = {"height": size[0], "width": size[1], "features": c.block_out_channels[0]}
    text = {
        **{"features": c.block_out_channels[0], "time_dim": c.time_dim, "text_length": settings.text_length},
        **{"hid_dim": c.encoder_hid_dim, "heads": c.addition_embed_type_num_heads, "aug_level": c.aug_level_embedding},
        "text_dim": c.cross_attention_dim,
    }
    yield _block("embedding", settings, text)
    ends = {"in_channels": c.in_channels, "out_channels": c.out_channels, "groups": c.norm_num_groups}
    yield _block("ends", settings, whole | ends | {"eps": c.norm_eps})
    current, scale = c.block_out_channels[0], c.resnet_out_scale_factor
    skips = [current]
    for i, width in enumerate(c.block_out_channels):
        for _ in range(c.layers_per_block[i]):
            yield residual(i, current, width, scale)
            if c.attention_levels[i]:
                yield attention(i, width)
            current = width
            skips.append(width)
        if i < last:
            yield residual(i, width, width, scale, way="down")
            skips.append(width)
    yield residual(last, current, current, c.mid_block_scale_factor)
    yield attention(last, current)
    yield residual(last, current, current, c.mid_block_scale_factor)
    for i in range(last, -1, -1):
        width = c.block_out_channels[i]
        for _ in range(c.layers_per_block[i] + 1):
            yield residual(i, current, width, scale, skip=skips.pop())
            if c.attention_levels[i]:
                yield attention(i, width)
            current = width
        if i > 0:
            yield residual(i, width, width, scale, way="up")
