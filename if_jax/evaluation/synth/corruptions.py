"""Pictures made worse in the ways that drawn ones are: bent, soft, noisy, blotched, tinted, compressed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates


@jax.jit
def corrupt(key: jax.Array, pictures: jax.Array) -> jax.Array:
    """Corrupt each picture by its own random mixture of flaws; about a quarter stay nearly as they are.

    Args:
      key: decides which flaws, and how strong.
      pictures: (B, S, S, 3) in [-1, 1], S a multiple of 8.

    Returns:
      The corrupted pictures, of the same shape, in [-1, 1].
    """
    batch, side = pictures.shape[0], pictures.shape[1]
    keys = jax.random.split(key, 8)
    strength = jax.random.uniform(keys[0], (batch, 1, 1, 1), minval=-0.33).clip(0.0)
    u = jax.random.uniform(keys[1], (6, batch, 1, 1, 1))
    x = _bend(keys[7], pictures, strength)
    x = _each_axis(_blur(1.6 * (strength * u[0])[:, 0, 0, 0], side), x)
    coarse = _each_axis(_resizes(side)[jax.random.randint(keys[2], (batch,), 0, 3)], x)
    x = jnp.where(u[1] < 0.4 * strength, coarse, x)
    x = x * (1 + 0.25 * strength * (u[2] - 0.5)) + 0.2 * strength * (u[3] - 0.5)
    x = x + 0.1 * strength * (jax.random.uniform(keys[3], (batch, 1, 1, 3)) - 0.5)
    blotches = _each_axis(_stretch(side // 8, side)[None], jax.random.normal(keys[4], (batch, side // 8, side // 8, 3)))
    x = x + 0.16 * strength * u[4] * blotches
    x = x + 0.2 * strength * u[5] * jax.random.normal(keys[5], x.shape)
    rounded = _compress(x, 0.02 + 0.1 * strength)
    return jnp.where(jax.random.uniform(keys[6], (batch, 1, 1, 1)) < strength, rounded, x).clip(-1.0, 1.0)


@jax.jit
def stretch(key: jax.Array, pictures: jax.Array, position: jax.Array, cells: int) -> tuple[jax.Array, jax.Array]:
    """Make about half of the pictures lower or higher about their middle row, by a quarter or so at most.

    The solids of the scenes have fixed proportions, so without this a reader takes whatever is as wide as high for a
    cube, a round one too.

    Args:
      key: decides which pictures, and by how much.
      pictures: (B, S, S, 3).
      position: (B, N, 2) of what is in them: column and row, in cells.
      cells: how many cells a picture has from side to side.

    Returns:
      The pictures (B, S, S, 3), and the positions (B, N, 2), which move along and stay within the picture.
    """
    batch, side = pictures.shape[0], pictures.shape[1]
    chosen, amount = jax.random.uniform(key, (2, batch))
    factor = jnp.where(chosen < 0.5, jnp.exp(0.56 * (amount - 0.5)), 1.0)  # 0.76 … 1.32
    middle = (side - 1) / 2
    source = ((jnp.arange(side) - middle) / factor[:, None] + middle).clip(0, side - 1)
    weights = jnp.maximum(0.0, 1 - jnp.abs(source[..., None] - jnp.arange(side)))
    row = ((position[..., 1] - cells / 2) * factor[:, None] + cells / 2).clip(0, cells - 1e-3)
    return jnp.einsum("bij,bjkc->bikc", weights, pictures), position.at[..., 1].set(row)


def _bend(key: jax.Array, x: jax.Array, strength: jax.Array) -> jax.Array:
    """Pictures seen through uneven glass: edges wave by some 2 % of the side, as those of solids half learnt do.

    strength (B, 1, 1, 1). The waves are 1/8 and 1/16 of the side long.
    """
    batch, side = x.shape[0], x.shape[1]
    amount, *fields = jax.random.split(key, 3)
    shift = jnp.zeros((batch, side, side, 2))
    for part, share, field in zip((8, 16), (1.0, 0.6), fields, strict=True):
        stretch = _stretch(part, side)[None]
        shift += share * _each_axis(stretch, jax.random.normal(field, (batch, part, part, 2)))
    shift *= 0.028 * side * strength * jax.random.uniform(amount, (batch, 1, 1, 1))
    rows = jnp.arange(side, dtype=jnp.float32)
    at = jnp.stack(jnp.meshgrid(rows, rows, indexing="ij"), -1) + shift

    def bent(picture: jax.Array, places: jax.Array) -> jax.Array:
        return map_coordinates(picture, [places[..., 0], places[..., 1]], order=1, mode="nearest")

    return jax.vmap(jax.vmap(bent, in_axes=(-1, None), out_axes=-1))(x, at)


def _each_axis(matrix: jax.Array, x: jax.Array) -> jax.Array:
    """Apply matrices (B or 1, N, S) to rows and to columns of (B, S, S, 3)."""
    matrix = jnp.broadcast_to(matrix, (x.shape[0], *matrix.shape[1:]))
    return jnp.einsum("bij,bjkc,blk->bilc", matrix, x, matrix)


def _blur(sigma: jax.Array, side: int) -> jax.Array:
    """Gaussian weights (B, S, S), each row's sum 1."""
    apart = jnp.arange(side)[:, None] - jnp.arange(side)[None]
    weights = jnp.exp(-0.5 * jnp.square(apart[None] / jnp.maximum(sigma, 0.05)[:, None, None]))
    return weights / weights.sum(-1, keepdims=True)


def _stretch(small: int, large: int) -> jax.Array:
    """Linear interpolation as a matrix (large, small)."""
    return jax.image.resize(jnp.eye(small), (large, small), "linear")


def _resizes(side: int) -> jax.Array:
    """Three matrices (3, S, S): down to fewer pixels and up again."""
    down = [jax.image.resize(jnp.eye(side), (side * part // 8, side), "linear") for part in (4, 5, 6)]
    return jnp.stack([jax.image.resize(matrix, (side, side), "cubic") for matrix in down])


def _compress(x: jax.Array, step: jax.Array) -> jax.Array:
    """Round the cosine transform of 8 x 8 blocks as JPEG does, high frequencies more coarsely. step (B, 1, 1, 1)."""
    n = np.arange(8)
    table = np.cos(np.pi * (2 * n[None] + 1) * n[:, None] / 16) * np.sqrt(np.where(n == 0, 1, 2) / 8)[:, None]
    b, h, w, c = x.shape
    blocks = x.reshape(b, h // 8, 8, w // 8, 8, c)
    waves = jnp.einsum("ui,bhiwjc,vj->bhuwvc", table, blocks, table)
    steps = (step * 8)[..., None, None] * (0.3 + (n[:, None, None, None] + n[:, None]) / 14)
    waves = jnp.round(waves / steps) * steps
    return jnp.einsum("ui,bhuwvc,vj->bhiwjc", table, waves, table).reshape(b, h, w, c)
