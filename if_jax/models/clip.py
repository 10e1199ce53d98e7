"""CLIP's two encoders (Radford et al. 2021, arXiv:2103.00020): texts and pictures to vectors of one space.

Module names are those of transformers' `CLIPModel`, with `_i` for its `.i`. OpenCLIP's networks are the same, with
the exact GELU where OpenAI's take x · sigmoid(1.702 x).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from if_jax.models.layers import Dense, Embed, LayerNorm, attention, gelu

Activation = Literal["quick_gelu", "gelu"]
_OLD_END = 2  # the end mark that configurations before transformers 4.31 name, wrongly; the largest id is meant


@dataclass(frozen=True)
class CLIPTextConfig:
    """Shape of a text encoder; field names are those of transformers' `CLIPTextConfig`."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: Activation = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    projection_dim: int = 512

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class CLIPVisionConfig:
    """Shape of a picture encoder; field names are those of transformers' `CLIPVisionConfig`."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: Activation = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512

    def __post_init__(self) -> None:
        _check(self)
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} must be a multiple of patch_size={self.patch_size}")


class CLIPText(nn.Module):
    """Token ids to states and to one vector in the space of pictures."""

    config: CLIPTextConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Encode captions.

        Args:
          ids: (B, L) int, L at most `max_position_embeddings`; what follows the end mark is not looked at.

        Returns:
          States (B, L, hidden_size) behind the last norm, and the projected state of the end mark
          (B, projection_dim), not normalised. Both float32.
        """
        c = self.config
        states = _TextTower(c, self.dtype, name="text_model")(ids)
        ends = ids if c.eos_token_id == _OLD_END else ids == c.eos_token_id
        pooled = jnp.take_along_axis(states, jnp.argmax(ends, axis=1)[:, None, None], axis=1)[:, 0]
        return states, _dense(c.projection_dim, ("in", "out"), self.dtype, "text_projection", False)(pooled).astype(
            jnp.float32
        )


class CLIPVision(nn.Module):
    """Pictures to states and to one vector in the space of texts."""

    config: CLIPVisionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pictures: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Encode pictures.

        Args:
          pictures: (B, image_size, image_size, 3), normalised as CLIP's are.

        Returns:
          States (B, 1 + patches, hidden_size) before the last norm, the first of them the picture's own, and its
          projection (B, projection_dim), not normalised. Both float32.
        """
        c = self.config
        states = _VisionTower(c, self.dtype, name="vision_model")
        hidden, pooled = states(pictures)
        projected = _dense(c.projection_dim, ("in", "out"), self.dtype, "visual_projection", False)(pooled)
        return hidden, projected.astype(jnp.float32)


class _TextTower(nn.Module):
    config: CLIPTextConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        length = ids.shape[1]
        x = _TextEmbeddings(self.config, self.dtype, name="embeddings")(ids)
        earlier = np.tril(np.ones((length, length), bool))
        bias = jnp.where(earlier, 0.0, jnp.finfo(jnp.float32).min)[None, None]
        x = _Encoder(self.config, self.dtype, name="encoder")(x, bias)
        return LayerNorm(self.config.layer_norm_eps, self.dtype, name="final_layer_norm")(x).astype(jnp.float32)


class _TextEmbeddings(nn.Module):
    config: CLIPTextConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        c, init = self.config, nn.initializers.normal(0.02)
        tokens = Embed(c.vocab_size, c.hidden_size, embedding_init=init, dtype=self.dtype, name="token_embedding")(ids)
        positions = Embed(
            c.max_position_embeddings,
            c.hidden_size,
            (None, "embed"),
            init,
            dtype=self.dtype,
            name="position_embedding",
        )
        return tokens + positions(jnp.arange(ids.shape[1]))


class _VisionTower(nn.Module):
    config: CLIPVisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, pictures: jax.Array) -> tuple[jax.Array, jax.Array]:
        c = self.config
        x = _VisionEmbeddings(c, self.dtype, name="embeddings")(pictures)
        x = LayerNorm(c.layer_norm_eps, self.dtype, name="pre_layrnorm")(x)  # spelt so in every release
        x = _Encoder(c, self.dtype, name="encoder")(x, None)
        pooled = LayerNorm(c.layer_norm_eps, self.dtype, name="post_layernorm")(x[:, 0])
        return x.astype(jnp.float32), pooled


class _VisionEmbeddings(nn.Module):
    config: CLIPVisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, pictures: jax.Array) -> jax.Array:
        c, init = self.config, nn.initializers.normal(0.02)
        batch, side = pictures.shape[0], c.image_size // c.patch_size
        patches = _PatchProjection(c.patch_size, c.hidden_size, self.dtype, name="patch_embedding")(pictures)
        own = self.param("class_embedding", init, (c.hidden_size,)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(own, (batch, 1, c.hidden_size)), patches], axis=1)
        positions = Embed(side * side + 1, c.hidden_size, (None, "embed"), init, self.dtype, name="position_embedding")
        return x + positions(jnp.arange(side * side + 1))


class _PatchProjection(nn.Module):
    """A convolution whose stride is its size, without bias, as the matrix product it is."""

    size: int
    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, pictures: jax.Array) -> jax.Array:
        batch, height, width, channels = pictures.shape
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, None, "in", "out"))
        kernel = self.param("kernel", init, (self.size, self.size, channels, self.features))
        rows, columns = height // self.size, width // self.size
        x = pictures.astype(self.dtype).reshape(batch, rows, self.size, columns, self.size, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)
        return x @ jnp.asarray(kernel, self.dtype).reshape(-1, self.features)


class _Encoder(nn.Module):
    config: CLIPTextConfig | CLIPVisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array | None) -> jax.Array:
        for i in range(self.config.num_hidden_layers):
            x = _Layer(self.config, self.dtype, name=f"layers_{i}")(x, bias)
        return x


class _Layer(nn.Module):
    """Attention and feed-forward, both pre-norm and residual."""

    config: CLIPTextConfig | CLIPVisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array | None) -> jax.Array:
        c = self.config
        x = x + _SelfAttention(c, self.dtype, name="self_attn")(
            LayerNorm(c.layer_norm_eps, self.dtype, name="layer_norm1")(x), bias
        )
        return x + _FeedForward(c, self.dtype, name="mlp")(
            LayerNorm(c.layer_norm_eps, self.dtype, name="layer_norm2")(x)
        )


class _SelfAttention(nn.Module):
    config: CLIPTextConfig | CLIPVisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array | None) -> jax.Array:
        width, heads = self.config.hidden_size, self.config.num_attention_heads
        query, key, value = (
            _dense(width, ("in", "heads"), self.dtype, name)(x) for name in ("q_proj", "k_proj", "v_proj")
        )
        out = attention(query, key, value, heads, scale=(width // heads) ** -0.5, bias=bias)
        return _dense(width, ("heads", "out"), self.dtype, "out_proj")(out)


class _FeedForward(nn.Module):
    config: CLIPTextConfig | CLIPVisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        x = _dense(c.intermediate_size, ("in", "mlp"), self.dtype, "fc1")(x)
        x = gelu(x) if c.hidden_act == "gelu" else x * jax.nn.sigmoid(1.702 * x)
        return _dense(c.hidden_size, ("mlp", "out"), self.dtype, "fc2")(x)


def _dense(features: int, axes: tuple[str, str], dtype: jnp.dtype, name: str, bias: bool = True) -> Dense:
    init = nn.initializers.normal(0.02)
    return Dense(features, use_bias=bias, axes=axes, kernel_init=init, dtype=dtype, name=name)


def _check(config: CLIPTextConfig | CLIPVisionConfig) -> None:
    for name, value in vars(config).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size={config.hidden_size} must be a multiple of num_attention_heads={config.num_attention_heads}"
        )
    if config.hidden_act not in ("quick_gelu", "gelu"):
        raise ValueError(f"hidden_act={config.hidden_act!r} is not computed here: quick_gelu or gelu")
