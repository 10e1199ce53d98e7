"""What one stage draws from, as one pytree: texts, the pictures it enlarges or draws over, and injected noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import numpy as np

from if_jax.diffusion.schedule import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class StageNoise:
    """Noise to use in place of drawn noise, to compare with another implementation; float32, B pictures, N steps."""

    initial: Array  # (B, H, W, 3)
    steps: Array  # (N, B, H, W, 3), row i is used at the i-th least noisy step, row 0 never
    low_res: Array | None = None  # (B, H, W, 3), super-resolution only

    def __getitem__(self, rows: np.ndarray) -> StageNoise:
        """The noise of some of the B pictures."""
        low_res = None if self.low_res is None else self.low_res[rows]
        return StageNoise(self.initial[rows], self.steps[:, rows], low_res)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class StageInputs:
    """What one stage draws B pictures from; a text state is (L, D), images are float32 in about [-1, 1]."""

    text: Array  # (B, L, D), of the prompts
    uncond: Array  # (B, L, D), what guidance draws away from
    low_res: Array | None = None  # (B, h, w, 3), what the stage before has drawn: super-resolution only
    style: Array | None = None  # (B, L, D), of style prompts, IF's third branch; it needs guidance
    support: Array | None = None  # (B, H, W, 3), pictures to draw over, noised as `StageSettings.strength` says
    mask: Array | None = None  # (B, H, W, 1), 1 where to draw over the support, 0 where to keep it
    noise: StageNoise | None = None

    def select(self, rows: np.ndarray, place: Callable[[Array], Array] = np.asarray) -> StageInputs:
        """The inputs of some of the B pictures.

        Args:
          rows: (b,) int, which pictures; a row may be repeated, to fill up a program.
          place: puts each array (b, …) where it is computed with. Noise stays where it is: its first axis are steps.
        """
        images = jax.tree.map(lambda array: place(array[rows]), replace(self, noise=None))
        return replace(images, noise=None if self.noise is None else self.noise[rows])
