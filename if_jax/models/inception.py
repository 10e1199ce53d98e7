"""The Inception-v3 of the Fréchet Inception distance: the network of 2015, with its own forms of pooling.

It is Szegedy et al. 2015 (arXiv:1512.00567) as TensorFlow ran it: mean pools do not count the padding, the last block
takes a maximum, and pictures are enlarged to 299 px by TensorFlow 1's bilinear rule, which samples from the corner of
a pixel. Names are those of the PyTorch files of these weights (pytorch-fid, torch-fidelity).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from if_jax.models.layers import KeptNorm

FEATURES = 2048  # of the pool behind the last block
_SIDE = 299
_EPSILON = 1e-3  # of the batch norms
KernelSize = tuple[int, int]


class Inception(nn.Module):
    """Pictures to the 2048 features that FID and KID compare."""

    @nn.compact
    def __call__(self, pictures: jax.Array) -> jax.Array:
        """Compute the features of pictures.

        Args:
          pictures: (B, H, W, 3) in 0 … 255, of any size.

        Returns:
          (B, 2048) float32.
        """
        x = (enlarge(pictures, _SIDE) - 128) / 128
        x = _Conv(32, (3, 3), 2, name="Conv2d_1a_3x3")(x)
        x = _Conv(32, (3, 3), name="Conv2d_2a_3x3")(x)
        x = _Conv(64, (3, 3), padded=True, name="Conv2d_2b_3x3")(x)
        x = _max_pool(x, 2)
        x = _Conv(80, (1, 1), name="Conv2d_3b_1x1")(x)
        x = _Conv(192, (3, 3), name="Conv2d_4a_3x3")(x)
        x = _max_pool(x, 2)
        for name, pooled in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = _BlockA(pooled, name=name)(x)
        x = _BlockB(name="Mixed_6a")(x)
        for name, width in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            x = _BlockC(width, name=name)(x)
        x = _BlockD(name="Mixed_7a")(x)
        x = _BlockE(False, name="Mixed_7b")(x)
        x = _BlockE(True, name="Mixed_7c")(x)
        return x.mean((1, 2))


def enlarge(pictures: jax.Array, side: int) -> jax.Array:
    """Resize as TensorFlow 1's `resize_bilinear` did: target pixel i is read at i · (old size / new size).

    Args:
      pictures: (B, H, W, C).
      side: of the result.

    Returns:
      (B, side, side, C) float32.
    """
    x = jnp.asarray(pictures, jnp.float32)
    for axis in (2, 1):
        size = x.shape[axis]
        at = np.arange(side, dtype=np.float32) * np.float32(size / side)
        low = at.astype(np.int32)
        shape = [1] * x.ndim
        shape[axis] = side
        share = (at - low).reshape(shape)
        first, second = (jnp.take(x, np.minimum(index, size - 1), axis=axis) for index in (low, low + 1))
        x = first + (second - first) * share
    return x


class _Conv(nn.Module):
    """Convolution without bias, batch norm with kept statistics, ReLU."""

    features: int
    size: KernelSize
    stride: int = 1
    padded: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = _Kernel(self.features, self.size, self.stride, self.padded, name="conv")(x)
        return nn.relu(KeptNorm(_EPSILON, name="bn")(x))


class _Kernel(nn.Module):
    features: int
    size: KernelSize
    stride: int
    padded: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.variance_scaling(2.0, "fan_in", "normal"), shape)
        padding = "SAME" if self.padded else "VALID"  # odd sizes, stride 1 where padded: as much on either side
        return jax.lax.conv_general_dilated(
            x, kernel, (self.stride, self.stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )


class _BlockA(nn.Module):
    pooled: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        straight = _Conv(64, (1, 1), name="branch1x1")(x)
        five = _Conv(48, (1, 1), name="branch5x5_1")(x)
        five = _Conv(64, (5, 5), padded=True, name="branch5x5_2")(five)
        three = _Conv(64, (1, 1), name="branch3x3dbl_1")(x)
        three = _Conv(96, (3, 3), padded=True, name="branch3x3dbl_2")(three)
        three = _Conv(96, (3, 3), padded=True, name="branch3x3dbl_3")(three)
        pool = _Conv(self.pooled, (1, 1), name="branch_pool")(_mean_pool(x))
        return jnp.concatenate([straight, five, three, pool], -1)


class _BlockB(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = _Conv(384, (3, 3), 2, name="branch3x3")(x)
        double = _Conv(64, (1, 1), name="branch3x3dbl_1")(x)
        double = _Conv(96, (3, 3), padded=True, name="branch3x3dbl_2")(double)
        double = _Conv(96, (3, 3), 2, name="branch3x3dbl_3")(double)
        return jnp.concatenate([three, double, _max_pool(x, 2)], -1)


class _BlockC(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        straight = _Conv(192, (1, 1), name="branch1x1")(x)
        single = _Conv(self.width, (1, 1), name="branch7x7_1")(x)
        single = _Conv(self.width, (1, 7), padded=True, name="branch7x7_2")(single)
        single = _Conv(192, (7, 1), padded=True, name="branch7x7_3")(single)
        double = _Conv(self.width, (1, 1), name="branch7x7dbl_1")(x)
        for i, size in enumerate(((7, 1), (1, 7), (7, 1)), 2):
            double = _Conv(self.width, size, padded=True, name=f"branch7x7dbl_{i}")(double)
        double = _Conv(192, (1, 7), padded=True, name="branch7x7dbl_5")(double)
        pool = _Conv(192, (1, 1), name="branch_pool")(_mean_pool(x))
        return jnp.concatenate([straight, single, double, pool], -1)


class _BlockD(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = _Conv(192, (1, 1), name="branch3x3_1")(x)
        three = _Conv(320, (3, 3), 2, name="branch3x3_2")(three)
        seven = _Conv(192, (1, 1), name="branch7x7x3_1")(x)
        seven = _Conv(192, (1, 7), padded=True, name="branch7x7x3_2")(seven)
        seven = _Conv(192, (7, 1), padded=True, name="branch7x7x3_3")(seven)
        seven = _Conv(192, (3, 3), 2, name="branch7x7x3_4")(seven)
        return jnp.concatenate([three, seven, _max_pool(x, 2)], -1)


class _BlockE(nn.Module):
    maximum: bool  # of the pool: the last block's

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        straight = _Conv(320, (1, 1), name="branch1x1")(x)
        three = _Conv(384, (1, 1), name="branch3x3_1")(x)
        three = self._both(three, "branch3x3_2")
        double = _Conv(448, (1, 1), name="branch3x3dbl_1")(x)
        double = _Conv(384, (3, 3), padded=True, name="branch3x3dbl_2")(double)
        double = self._both(double, "branch3x3dbl_3")
        pool = _Conv(192, (1, 1), name="branch_pool")(_max_pool(x, 1) if self.maximum else _mean_pool(x))
        return jnp.concatenate([straight, three, double, pool], -1)

    def _both(self, x: jax.Array, name: str) -> jax.Array:
        """Side by side, a row's and a column's convolution."""
        rows = _Conv(384, (1, 3), padded=True, name=f"{name}a")(x)
        return jnp.concatenate([rows, _Conv(384, (3, 1), padded=True, name=f"{name}b")(x)], -1)


def _max_pool(x: jax.Array, stride: int) -> jax.Array:
    """3×3; padded where the size stays."""
    padding = "VALID" if stride > 1 else "SAME"
    return nn.max_pool(x, (3, 3), (stride, stride), padding)


def _mean_pool(x: jax.Array) -> jax.Array:
    """3×3, the size stays; the padding does not count."""
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)
