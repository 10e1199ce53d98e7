"""What a super-resolution stage is shown: the low-res image, enlarged and noised.

    (1)  y = √ᾱ_n up(low) + √(1 − ᾱ_n) z,   z ~ N(0, I)

n is the noise level, an index of the full training chain; the network is told it. During training the low-res image
is the target made small by bicubic resampling, and n is uniform, so that one network serves any level.

Source: Ho et al. 2021 (arXiv:2106.15282), section 4; Saharia et al. 2022 (arXiv:2205.11487), section 2.3.
Resampling is linear along each axis, so both directions are two small matrix products: quick on every device.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from if_jax.diffusion.process import add_noise
from if_jax.diffusion.schedule import Array, Schedule


def upsample(low: Array, size: int | tuple[int, int]) -> jax.Array:
    """Enlarge bilinearly with corner pixels on corner pixels (torch's align_corners=True).

    Args:
      low: (B, h, w, C).
      size: H = W or (H, W).

    Returns:
      (B, H, W, C); its pixel i lies at i · (h − 1)/(H − 1) of the input.
    """
    height, width = _pair(size)
    return _resample(low, _bilinear_matrix(low.shape[1], height), _bilinear_matrix(low.shape[2], width))


def downsample(x0: Array, size: int | tuple[int, int]) -> jax.Array:
    """Make smaller by antialiased bicubic resampling with Pillow's kernel.

    Args:
      x0: (B, H, W, C) in [−1, 1].
      size: h = w or (h, w).

    Returns:
      (B, h, w, C). Bicubic weights overshoot at edges; like an 8-bit picture it is clipped to [−1, 1].
    """
    height, width = _pair(size)
    small = _resample(x0, _bicubic_matrix(x0.shape[1], height), _bicubic_matrix(x0.shape[2], width))
    return jnp.clip(small, -1, 1)


def noise_augment(schedule: Schedule, low_up: Array, level: Array, eps: Array) -> jax.Array:
    """Noise the enlarged low-res image: y of equation (1).

    Args:
      schedule: the training chain that level indexes.
      low_up: up(low), (B, H, W, C).
      level: n, (B,) int.
      eps: z, (B, H, W, C).
    """
    return add_noise(schedule, low_up, level, eps)


def blur(image: jax.Array, sigma: jax.Array, max_sigma: float) -> jax.Array:
    """Gaussian blur with mirrored edges.

    Args:
      image: (B, H, W, C).
      sigma: (B,), in pixels; 0 changes nothing.
      max_sigma: the largest of them, which sets the kernel's reach.
    """
    reach = max(1, math.ceil(3 * max_sigma))
    offset = jnp.arange(-reach, reach + 1)
    weights = jnp.exp(-0.5 * (offset / jnp.maximum(sigma, 1e-3)[:, None]) ** 2)  # (B, taps)
    weights = weights / weights.sum(-1, keepdims=True)
    for axis in (1, 2):
        size = image.shape[axis]
        padding = [(reach, reach) if i == axis else (0, 0) for i in range(4)]
        wide = jnp.pad(image, padding, mode="reflect")
        shifted = [jax.lax.slice_in_dim(wide, i, i + size, axis=axis) for i in range(2 * reach + 1)]
        terms = [weights[:, i, None, None, None] * part for i, part in enumerate(shifted)]
        image = functools.reduce(jnp.add, terms)
    return image


def random_sigma(key: jax.Array, batch: int, max_sigma: float) -> jax.Array:
    """(batch,) widths of blurs: 0 for a random half, else uniform in [0, max_sigma] (Ho et al., section 4.1)."""
    pick_key, sigma_key = jax.random.split(key)
    sigma = jax.random.uniform(sigma_key, (batch,), maxval=max_sigma)
    return jnp.where(jax.random.bernoulli(pick_key, 0.5, (batch,)), sigma, 0.0)


def random_level(key: jax.Array, batch: int, highest: int = 999) -> jax.Array:
    """(batch,) int32 noise levels, uniform from 0 to the highest."""
    return jax.random.randint(key, (batch,), 0, highest + 1)


def _resample(image: Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
    """Apply (H, h) and (W, w) weights to (B, h, w, C); full precision, since bfloat16 products would add a grain."""
    out = jnp.einsum("Hh,bhwc->bHwc", rows, image, precision=jax.lax.Precision.HIGHEST)
    return jnp.einsum("Ww,bHwc->bHWc", columns, out, precision=jax.lax.Precision.HIGHEST)


@functools.lru_cache(maxsize=32)
def _bilinear_matrix(size_in: int, size_out: int) -> np.ndarray:
    """(size_out, size_in) float32 weights of linear interpolation with aligned corners."""
    step = (size_in - 1) / (size_out - 1) if size_out > 1 else 0.0
    # Positions rounded to float32, as torch has them: stages were trained on, and are compared with, its pixels.
    position = np.minimum(np.arange(size_out, dtype=np.float32) * np.float32(step), size_in - 1)
    return np.maximum(0.0, 1 - np.abs(position[:, None] - np.arange(size_in))).astype(np.float32)


@functools.lru_cache(maxsize=32)
def _bicubic_matrix(size_in: int, size_out: int) -> np.ndarray:
    """(size_out, size_in) float32 weights: Keys' cubic kernel with a = −1/2, widened by the reduction factor."""
    scale = size_in / size_out
    width = max(scale, 1.0)
    centre = (np.arange(size_out) + 0.5) * scale
    distance = np.abs((np.arange(size_in) + 0.5 - centre[:, None]) / width)
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size
