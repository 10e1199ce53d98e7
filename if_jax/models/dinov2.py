"""DINOv2's picture encoder (Oquab et al. 2023, arXiv:2304.07193), whose features FD-DINOv2 compares.

Module names are those of transformers' `Dinov2Model`, with `_i` for its `.i`.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from if_jax.models.layers import Dense, LayerNorm, attention, gelu


@dataclass(frozen=True)
class DINOv2Config:
    """Shape of the encoder; field names are those of transformers' `Dinov2Config`."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: int = 4
    image_size: int = 518
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True

    def __post_init__(self) -> None:
        if self.hidden_size < 1 or self.hidden_size % max(self.num_attention_heads, 1):
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}"
            )
        if self.patch_size < 1 or self.image_size < self.patch_size:
            raise ValueError(f"image_size={self.image_size} must be at least patch_size={self.patch_size}")

    @property
    def places(self) -> int:
        """Patches along a side that the table of positions was trained for."""
        return self.image_size // self.patch_size


class DINOv2(nn.Module):
    """Pictures to the state of the class token behind the last norm."""

    config: DINOv2Config

    @nn.compact
    def __call__(self, pictures: jax.Array) -> jax.Array:
        """Encode pictures.

        Args:
          pictures: (B, S, S, 3), normalised as ImageNet's are; S a multiple of `patch_size`. The table of positions is
            resampled where S is not `image_size`.

        Returns:
          (B, hidden_size) float32.
        """
        c = self.config
        x = _Embeddings(c, name="embeddings")(pictures)
        x = _Encoder(c, name="encoder")(x)
        return LayerNorm(c.layer_norm_eps, name="layernorm")(x)[:, 0]


def resampling(size: int, target: int) -> np.ndarray:
    """The matrix (target, size) of PyTorch's bicubic resize of one axis, which spreads nothing where it shrinks.

    Args:
      size: entries of the axis.
      target: entries it becomes.
    """
    matrix = np.zeros((target, size))
    for row in range(target):
        at = (row + 0.5) * size / target - 0.5
        low = int(np.floor(at))
        for place in range(low - 1, low + 3):
            matrix[row, min(max(place, 0), size - 1)] += _cubic(abs(at - place))
    return matrix


def _cubic(distance: float) -> float:
    a = -0.75  # PyTorch's
    if distance <= 1:
        return (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    return a * (distance**3 - 5 * distance**2 + 8 * distance - 4) if distance < 2 else 0.0


class _Embeddings(nn.Module):
    config: DINOv2Config

    @nn.compact
    def __call__(self, pictures: jax.Array) -> jax.Array:
        c, init = self.config, nn.initializers.normal(0.02)
        own = self.param("cls_token", init, (1, 1, c.hidden_size))
        table = self.param("position_embeddings", init, (1, 1 + c.places**2, c.hidden_size))
        patches = _PatchEmbeddings(c, name="patch_embeddings")(pictures)
        side = pictures.shape[1] // c.patch_size
        places = table[:, 1:]
        if side != c.places:
            matrix = jnp.asarray(resampling(c.places, side), jnp.float32)
            square = places[0].reshape(c.places, c.places, c.hidden_size)
            places = jnp.einsum("ai,bj,ijd->abd", matrix, matrix, square).reshape(1, side * side, c.hidden_size)
        x = jnp.concatenate([jnp.broadcast_to(own, (len(patches), 1, c.hidden_size)), patches], axis=1)
        return x + jnp.concatenate([table[:, :1], places], axis=1)


class _PatchEmbeddings(nn.Module):
    config: DINOv2Config

    @nn.compact
    def __call__(self, pictures: jax.Array) -> jax.Array:
        return _PatchProjection(self.config.patch_size, self.config.hidden_size, name="projection")(pictures)


class _PatchProjection(nn.Module):
    """A convolution whose stride is its size, as the matrix product it is."""

    size: int
    features: int

    @nn.compact
    def __call__(self, pictures: jax.Array) -> jax.Array:
        batch, height, width, channels = pictures.shape
        shape = (self.size, self.size, channels, self.features)
        kernel = self.param("kernel", nn.initializers.normal(0.02), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        rows, columns = height // self.size, width // self.size
        x = pictures.reshape(batch, rows, self.size, columns, self.size, channels)
        return (
            x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1) @ kernel.reshape(-1, self.features) + bias
        )


class _Encoder(nn.Module):
    config: DINOv2Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.config.num_hidden_layers):
            x = _Layer(self.config, name=f"layer_{i}")(x)
        return x


class _Layer(nn.Module):
    """Attention and feed-forward, both pre-norm, residual, and scaled channel by channel."""

    config: DINOv2Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        eps = self.config.layer_norm_eps
        h = _Attention(self.config, name="attention")(LayerNorm(eps, name="norm1")(x))
        x = x + _LayerScale(name="layer_scale1")(h)
        h = _FeedForward(self.config, name="mlp")(LayerNorm(eps, name="norm2")(x))
        return x + _LayerScale(name="layer_scale2")(h)


class _LayerScale(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.param("lambda1", nn.initializers.ones_init(), (x.shape[-1],))


class _Attention(nn.Module):
    config: DINOv2Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        heads = _Heads(self.config, name="attention")(x)
        return _Output(self.config.hidden_size, name="output")(heads)


class _Heads(nn.Module):
    config: DINOv2Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        query, key, value = (
            Dense(c.hidden_size, use_bias=c.qkv_bias, axes=("in", "heads"), name=name)(x)
            for name in ("query", "key", "value")
        )
        scale = (c.hidden_size // c.num_attention_heads) ** -0.5
        return attention(query, key, value, c.num_attention_heads, scale=scale)


class _Output(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return Dense(self.features, axes=("heads", "out"), name="dense")(x)


class _FeedForward(nn.Module):
    config: DINOv2Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        x = gelu(Dense(c.hidden_size * c.mlp_ratio, axes=("in", "mlp"), name="fc1")(x))
        return Dense(c.hidden_size, axes=("mlp", "out"), name="fc2")(x)
