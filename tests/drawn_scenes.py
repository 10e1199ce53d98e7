"""Scenes of the source "scenes" as pictures."""

from __future__ import annotations

import jax

from if_jax.scenes import raycast, sampling


def draw_scenes(indices: jax.Array, seed: int, size: int) -> jax.Array:
    """Pictures number `indices` (B,) of `seed`: (B, size, size, 3) uint8."""
    return raycast.render_scenes(sampling.sample_scenes(indices, seed), size)
