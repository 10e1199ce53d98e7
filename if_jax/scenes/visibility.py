"""What of a scene can be seen, so that no caption names what is hidden behind something else."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from if_jax.scenes import geometry
from if_jax.scenes.scene import Scene


def visible_shares(scene: Scene, size: int = 64) -> tuple[jax.Array, jax.Array]:
    """How much of each object and of the sign's board can be seen, nothing standing in front of it.

    Args:
      scene: one scene.
      size: one ray is cast through each of size x size pixels.

    Returns:
      objects: (6,) float32, pixels seen over pixels it would have alone; 0 for an empty slot.
      sign: () float32, the same of the board; 1 without a sign.
    """
    ray, solids, slots = geometry.rays(size), geometry.place_solids(scene), scene.valid.shape[-1]
    floor = geometry.bare_floor(ray)

    def add(i: jax.Array, state: tuple[geometry.Hit, jax.Array]) -> tuple[geometry.Hit, jax.Array]:
        hit, alone = state
        own = geometry.nearer(scene, solids, i, ray, floor)
        return geometry.nearer(scene, solids, i, ray, hit), alone.at[i].set((own.slot == i).sum())

    hit, alone = jax.lax.fori_loop(0, slots, add, (floor, jnp.zeros(slots, jnp.int32)))
    board = geometry.find_board(scene, ray).met
    uncovered = board & (hit.t > geometry.SIGN_DEPTH)
    seen = (hit.slot[None] == jnp.arange(slots)[:, None, None]) & ~uncovered
    shares = seen.sum((1, 2)) / jnp.maximum(alone, 1)
    return shares, jnp.where(board.any(), uncovered.sum() / jnp.maximum(board.sum(), 1), 1.0)
