"""Primitive layers shared by the UNets and the T5 encoder, and the only place that names logical axes.

Every kernel carries two logical names, one for its input and one for its output dimension
("in", "out", "heads", "mlp", "vocab", "embed"); `if_jax.parallel` decides what they mean on a mesh. Biases and norm
parameters carry none: they are small and stay replicated.

Precision: parameters are float32, matrix products run in `dtype`, norm statistics and softmax run in float32.
"""

from __future__ import annotations

import math
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Axes = tuple[str | None, str | None]
Initializer = jax.nn.initializers.Initializer

# Uniform in +-1/sqrt(fan_in): what IF's convolutions and linear layers start from.
UNIFORM_FAN_IN: Initializer = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Dense(nn.Module):
    """Linear layer on the last axis: (..., in) -> (..., features)."""

    features: int
    use_bias: bool = True
    axes: Axes = ("in", "out")
    kernel_init: Initializer = UNIFORM_FAN_IN
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = _param(self, "kernel", self.kernel_init, self.axes, (x.shape[-1], self.features))
        y = x.astype(self.dtype) @ kernel.astype(self.dtype)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros_init(), (self.features,)).astype(self.dtype)
        return y


class Conv(nn.Module):
    """Square convolution of odd size, stride 1, zero padding: (B, H, W, in) -> (B, H, W, features)."""

    features: int
    size: int = 3
    kernel_init: Initializer = UNIFORM_FAN_IN
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = _param(self, "kernel", self.kernel_init, (None, None, "in", "out"), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        return convolve(x.astype(self.dtype), kernel.astype(self.dtype)) + bias.astype(self.dtype)


class Embed(nn.Module):
    """Table lookup: int (...) -> (..., features)."""

    num_embeddings: int
    features: int
    axes: Axes = ("vocab", "embed")
    embedding_init: Initializer = nn.initializers.normal(1.0)
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        table = _param(self, "embedding", self.embedding_init, self.axes, (self.num_embeddings, self.features))
        return jnp.take(table.astype(self.dtype), ids, axis=0)


class GroupNorm(nn.Module):
    """Group normalisation over all axes but the first and last, and the channels of each group: (B, ..., C).

    `film` = (scale, shift), both (B, C), is applied after the norm's own gain and bias as y * (1 + scale) + shift;
    folded into one gain and one offset per channel it costs nothing extra.
    """

    num_groups: int = 32
    eps: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, film: tuple[jax.Array, jax.Array] | None = None) -> jax.Array:
        channels = x.shape[-1]
        gain = self.param("scale", nn.initializers.ones_init(), (channels,))
        offset = self.param("bias", nn.initializers.zeros_init(), (channels,))
        mean, inverse_std = _group_statistics(x, self.num_groups, self.eps)  # (B, C) each
        gain, offset = inverse_std * gain, offset[None]
        if film is not None:
            scale, shift = (f.astype(jnp.float32) for f in film)
            gain, offset = gain * (1 + scale), offset * (1 + scale) + shift
        mean, gain, offset = (_expand(a, x.ndim) for a in (mean, gain, offset))
        return ((x.astype(jnp.float32) - mean) * gain + offset).astype(self.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, with gain and bias."""

    eps: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gain = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],))
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + self.eps) * gain + bias).astype(self.dtype)


class KeptNorm(nn.Module):
    """Batch normalisation by the statistics that training has left."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ones, zeros, shape = nn.initializers.ones_init(), nn.initializers.zeros_init(), (x.shape[-1],)
        scale, bias = self.param("scale", ones, shape), self.param("bias", zeros, shape)
        mean, variance = self.param("running_mean", zeros, shape), self.param("running_var", ones, shape)
        return (x - mean) * (jax.lax.rsqrt(variance + self.eps) * scale) + bias


class RMSNorm(nn.Module):
    """T5's norm: divide by the root mean square of the last axis; a gain, no mean and no bias."""

    eps: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gain = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return (x * jax.lax.rsqrt(mean_square + self.eps) * gain).astype(self.dtype)


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The one convolution of the project: NHWC by HWIO, stride 1, zero padding that keeps the size."""
    if kernel.shape[:2] == (1, 1):  # a matrix product is what it is
        return x @ kernel[0, 0]
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU (error function), computed in float32; the tanh form differs by up to 5e-4."""
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    num_heads: int,
    scale: float,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Multi-head attention; head h owns the h-th contiguous slice of the channels. Softmax in float32.

    Plain matrix products with the heads moved to the batch: on a CPU twice as fast, forward and backward, as
    `jax.nn.dot_product_attention`, which leaves the heads inside and copies.

    Args:
      query: (B, T, C).
      key: (B, S, C).
      value: (B, S, C).
      num_heads: a divisor of C.
      scale: of the logits.
      bias: added to the logits, broadcastable to (B, heads, T, S).

    Returns:
      (B, T, C).
    """
    dtype = query.dtype
    query, key, value = (_split_heads(a, num_heads) for a in (query * scale, key, value))  # (B, heads, T or S, dim)
    logits = jnp.einsum("bhtd,bhsd->bhts", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits if bias is None else logits + bias, axis=-1).astype(dtype)
    out = jnp.einsum("bhts,bhsd->bhtd", weights, value).transpose(0, 2, 1, 3)  # (B, T, heads, dim)
    return out.reshape(*out.shape[:2], -1)


def upsample(x: jax.Array) -> jax.Array:
    """Nearest neighbour, twice the size: (B, H, W, C) -> (B, 2H, 2W, C)."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def downsample(x: jax.Array) -> jax.Array:
    """Mean of 2x2 pixels: (B, H, W, C) -> (B, H/2, W/2, C); H and W even."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, c)
    # Four terms by index rather than a mean over two axes: half the time on a CPU.
    return (x[:, :, 0, :, 0] + x[:, :, 0, :, 1] + x[:, :, 1, :, 0] + x[:, :, 1, :, 1]) * 0.25


def sinusoid(t: jax.Array, dim: int) -> jax.Array:
    """Embedding [cos | sin] of an integer step at dim/2 frequencies from 1 down to (almost) 1/10000: (B,) -> (B, dim).

    Always float32: integers above 256 are not exact in bfloat16.
    """
    half = dim // 2
    frequencies = np.exp(-math.log(10000) * np.arange(half, dtype=np.float32) / np.float32(half))
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _param(
    module: nn.Module, name: str, init: Initializer, axes: tuple[str | None, ...], shape: tuple[int, ...]
) -> jax.Array:
    """A parameter with logical names, which Flax unboxes."""
    return cast(jax.Array, module.param(name, nn.with_logical_partitioning(init, axes), shape))


def _split_heads(x: jax.Array, num_heads: int) -> jax.Array:
    """(B, T, C) -> (B, heads, T, C/heads)."""
    return x.reshape(*x.shape[:2], num_heads, -1).transpose(0, 2, 1, 3)


def _group_statistics(x: jax.Array, num_groups: int, eps: float) -> tuple[jax.Array, jax.Array]:
    """Mean and 1/std of each group, repeated to its channels: two float32 arrays (B, C).

    One pass over x gives both per-channel sums, which the compiler fuses into whatever produced x; the groups are
    formed on the small (B, C) sums, so that the large array is never reshaped.
    """
    wide, spatial = jnp.asarray(x, jnp.float32), tuple(range(1, x.ndim - 1))
    batch, channels = x.shape[0], x.shape[-1]
    sums = (wide.mean(axis=spatial), jnp.square(wide).mean(axis=spatial))  # (B, C) each
    mean, mean_square = (s.reshape(batch, num_groups, -1).mean(axis=-1) for s in sums)  # (B, groups)
    # The difference of two rounded numbers can fall below zero where a group is constant.
    variance = jnp.maximum(mean_square - jnp.square(mean), 0)
    inverse_std = jax.lax.rsqrt(variance + eps)
    mean, inverse_std = (jnp.repeat(s, channels // num_groups, axis=-1) for s in (mean, inverse_std))
    return mean, inverse_std


def _expand(a: jax.Array, ndim: int) -> jax.Array:
    """(B, C) -> (B, 1, ..., 1, C)."""
    return a.reshape(a.shape[0], *(1,) * (ndim - 2), a.shape[-1])
