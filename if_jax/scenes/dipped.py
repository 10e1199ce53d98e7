"""Solids dipped in black paint, under a rare word: what no other source shows or names, to fine-tune on and measure by.

A picture holds one solid, its caption is "a red sks cube". Nothing else in the scenes is dark but signs and deep
shadows, so the share of an object that is dark tells whether its lower half is painted.
"""

from __future__ import annotations

import jax
import numpy as np

from if_jax.scenes import grammar, tasks
from if_jax.scenes.scene import Scene

WORD = "sks"
_DARK = 0.2  # brightest channel of a dark pixel is less, of 1
_COLOURED = 0.25  # largest less smallest channel of a coloured pixel is more
_SHARE = 0.12  # renders: at most 0.03 without paint, at least 0.2 with it


def sample_dipped(indices: np.ndarray, seed: int) -> Scene:
    """Sample scenes number `indices` (B,) of a seed, every field with a leading B; no held-out combination."""
    return tasks.sample_alone(indices, seed)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """ "a red sks cube", of one scene on the host; always the same, whatever `rng`."""
    return describe(*(getattr(grammar.groups(scene)[0], name) for name in ("colour", "shape")))


def describe(colour: str, shape: str) -> str:
    """The caption of a dipped solid, which is also the prompt that asks for it."""
    return grammar.with_article(f"{colour} {WORD} {shape}")


def dark_share(pictures: np.ndarray) -> np.ndarray:
    """The share of what is not floor that is dark, (B,).

    Args:
      pictures: (B, S, S, 3) uint8, without signs.
    """
    values = np.asarray(pictures, np.float32) / 255
    brightest, smallest = values.max(-1), values.min(-1)
    dark = brightest < _DARK
    coloured = (brightest - smallest > _COLOURED) & ~dark
    return dark.sum((1, 2)) / np.maximum(1, (dark | coloured).sum((1, 2)))


def is_dipped(pictures: np.ndarray) -> np.ndarray:
    """Whether pictures (B, S, S, 3) uint8 show dipped solids, (B,) bool."""
    return dark_share(pictures) > _SHARE


def which(scenes: Scene) -> jax.Array:
    """(B, 6) bool, as `raycast.render_scenes` takes it: every object of the scenes is dipped."""
    return scenes.valid
