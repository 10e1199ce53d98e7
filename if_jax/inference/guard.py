"""IF's guard: pictures that two heads on CLIP's vectors take for unsafe or for watermarked are blurred out.

The arithmetic is that of IF's own code, its oddity included: the picture goes into CLIP's normalisation in [-1, 1], not
in [0, 1]. Its features are rounded to float16, each head is a logistic regression, and what either gives more than half
is blurred beyond recognition. (diffusers takes the picture in [0, 1], compares the raw logit, and returns black.) It is
off unless a folder is named, reads its weights with the first picture, and fetches nothing.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from if_jax.checkpoints.feature_weights import CLIP_MEAN, CLIP_STD
from if_jax.checkpoints.guard_weights import GuardWeights, read_guard
from if_jax.models.clip import CLIPVision

THRESHOLD = 0.5
_KERNEL, _SIGMA = 99, 100.0  # of the blur, in pixels


class GuardScores(NamedTuple):
    """What the guard makes of one picture: probabilities."""

    unsafe: float
    watermark: float

    @property
    def hidden(self) -> bool:
        """Whether the picture is blurred."""
        return max(self.unsafe, self.watermark) > THRESHOLD


class SafetyGuard:
    """IF's two heads over a CLIP."""

    def __init__(self, folder: str | Path) -> None:
        """Name the guard's weights, which are read with the first picture.

        Args:
          folder: see `guard_weights`.
        """
        self.folder = Path(folder)

    @cached_property
    def weights(self) -> GuardWeights:
        """The weights; FileNotFoundError or ValueError where they cannot be read."""
        return read_guard(self.folder)

    def scores(self, pictures: np.ndarray) -> list[GuardScores]:
        """What the guard makes of pictures.

        Args:
          pictures: (B, H, W, 3) in about [-1, 1].
        """
        features = self._features(pictures).astype(np.float16)
        heads = self.weights.heads
        unsafe, watermark = (probability(features, *heads[word]) for word in ("unsafe", "watermark"))
        return [GuardScores(float(p), float(w)) for p, w in zip(unsafe, watermark, strict=True)]

    def hide(self, pictures: np.ndarray) -> tuple[np.ndarray, list[GuardScores]]:
        """The pictures (B, H, W, 3), those that the guard hides blurred, and what it makes of each."""
        scores, shown = self.scores(pictures), np.array(pictures, np.float32)
        for row, score in enumerate(scores):
            if score.hidden:
                shown[row] = blurred(shown[row])
        return shown, scores

    def _features(self, pictures: np.ndarray) -> np.ndarray:
        rows = [np.asarray(self._encode(jnp.asarray(picture)[None])[0], np.float32) for picture in pictures]
        return np.stack(rows)

    @cached_property
    def _encode(self) -> Any:
        config, params, _ = self.weights
        on_device = jax.device_put(params)

        @jax.jit
        def encode(params: Any, pictures: jax.Array) -> jax.Array:
            fitted = to_clip(pictures, config.image_size)
            _, vectors = CLIPVision(config).apply({"params": params}, fitted)
            return jnp.asarray(vectors)

        return lambda pictures: encode(on_device, pictures)


def to_clip(pictures: jax.Array, side: int) -> jax.Array:
    """Pictures (B, H, W, 3) as IF's code shows them to CLIP: middle square, antialiased bicubic, normalised.

    Args:
      pictures: in [-1, 1].
      side: of CLIP's pictures.
    """
    _, height, width, _ = pictures.shape
    short = min(height, width)
    top, left = round((height - short) / 2), round((width - short) / 2)
    middle = pictures[:, top : top + short, left : left + short]
    fitted = jax.image.resize(middle, (middle.shape[0], side, side, 3), "cubic", antialias=True)
    return (fitted - jnp.asarray(CLIP_MEAN)) / jnp.asarray(CLIP_STD)


def probability(features: np.ndarray, weights: np.ndarray, bias: float) -> np.ndarray:
    """Logistic regression of features (B, D): (B,)."""
    logits = features.astype(np.float32) @ weights + np.float32(bias)
    return np.where(logits >= 0, 1 / (1 + np.exp(-np.abs(logits))), 1 - 1 / (1 + np.exp(-np.abs(logits))))


def blurred(picture: np.ndarray) -> np.ndarray:
    """One picture (H, W, 3) under IF's blur: a Gaussian of 99 pixels and σ 100, reflected at the borders."""
    reach = _KERNEL // 2
    places = np.arange(-reach, reach + 1)
    kernel = np.exp(-0.5 * (places / _SIGMA) ** 2)
    kernel /= kernel.sum()
    wide = np.pad(np.asarray(picture, np.float64), ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    for axis in (0, 1):
        wide = np.apply_along_axis(np.convolve, axis, wide, kernel, mode="valid")
    return wide.astype(np.float32)
