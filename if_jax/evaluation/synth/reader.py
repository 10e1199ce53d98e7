"""The reader: a small convolutional net that finds the solids in a 64 px picture of the scenes' world.

Every cell of a 16 x 16 grid says whether the middle of an object lies in it, where in the cell, and what that object
is: objects as points, as in CenterNet (Zhou et al. 2019, arXiv 1904.07850). It judges pictures and draws none.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from if_jax.models.layers import Conv, Dense, GroupNorm, downsample, upsample

PIXELS = 64
CELLS = 16
FIELDS = {"shape": 3, "colour": 8, "size": 2, "material": 2}  # classes of each attribute


class Grid(NamedTuple):
    """The net's output for each cell; logits, but for `offset` and `features`."""

    middle: jax.Array  # (B, 16, 16) the middle of an object lies here
    offset: jax.Array  # (B, 16, 16, 2) where in the cell: column, row, about 0…1
    fields: dict[str, jax.Array]  # "shape" -> (B, 16, 16, classes), …
    features: jax.Array  # (B, 104) means of the inner maps, for distances between sets of pictures


class Reader(nn.Module):
    """Pictures (B, 64, 64, 3) in [-1, 1] -> `Grid`."""

    width: int = 40
    deep: int = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> Grid:
        x = nn.silu(Conv(32, name="stem")(_fold(x)))  # (B, 32, 32, 32)
        x = Dense(self.width, name="to_grid")(_fold(x))  # (B, 16, 16, width)
        x = _Block(name="near")(x)
        coarse = Dense(self.deep, name="to_coarse")(downsample(x))  # (B, 8, 8, deep)
        for i in range(2):
            coarse = _Block(name=f"coarse_{i}")(coarse)
        x = x + upsample(Dense(self.width, name="to_fine")(coarse))
        x = _Block(name="fine")(x)
        features = jnp.concatenate([coarse.mean((1, 2)), x.mean((1, 2))], axis=-1)
        x = nn.silu(GroupNorm(8, name="norm")(x))
        out = Dense(3 + sum(FIELDS.values()), name="head")(x)
        middle, offset, *fields = jnp.split(out, _starts(), axis=-1)
        # Few cells hold a middle: at first each says so with a chance of about one in fifty.
        return Grid(middle[..., 0] - 4.0, offset + 0.5, dict(zip(FIELDS, fields, strict=True)), features)


def apply_reader(params: Any, pictures: jax.Array) -> Grid:
    """The reader's output for pictures (B, S, S, 3) in [-1, 1], S a multiple of 8."""
    return cast(Grid, Reader().apply({"params": params}, pictures))


class _Block(nn.Module):
    """Two convolutions beside a shortcut."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inner = Conv(x.shape[-1], name="first")(nn.silu(GroupNorm(8, name="norm_first")(x)))
        return x + Conv(x.shape[-1], name="second")(nn.silu(GroupNorm(8, name="norm_second")(inner)))


def _fold(x: jax.Array) -> jax.Array:
    """2 x 2 pixels become channels: (B, H, W, C) -> (B, H/2, W/2, 4C)."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h // 2, w // 2, 4 * c)


def _starts() -> list[int]:
    """Where each part of the head's channels begins, but for the first."""
    starts, widths = [1, 3], list(FIELDS.values())
    for width in widths[:-1]:
        starts.append(starts[-1] + width)
    return starts
