"""The blocks of IF's UNet: residual block, added-KV attention, the three kinds of level, and the two embeddings.

Module names are those of diffusers' `UNet2DConditionModel`, with `_i` for its `.i`, so that the table of weight names
in `if_jax.checkpoints.names` is a short rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from if_jax.models.layers import Conv, Dense, GroupNorm, LayerNorm, attention, downsample, gelu, upsample

ZEROS = nn.initializers.zeros_init()
TEXT_GROUPS = 32  # of the norm on the text in each attention block, whatever the groups of the other norms

Remat = Literal["none", "blocks", "dots"]  # what the backward pass computes again, for less memory


@dataclass(frozen=True)
class BlockSettings:
    """What all blocks of one UNet have in common (see `UNetConfig`), and how they are computed."""

    head_dim: int
    num_groups: int
    eps: float
    skip_time_act: bool
    only_cross_attention: bool
    dtype: jnp.dtype
    remat: Remat

    def norm(self, name: str) -> GroupNorm:
        """A group norm with this UNet's settings."""
        return GroupNorm(self.num_groups, self.eps, self.dtype, name=name)


class ResBlock(nn.Module):
    """Residual block with FiLM from the embedding, and resampling of both branches before its first convolution."""

    features: int
    settings: BlockSettings
    out_scale: float = 1.0
    resample: Literal["none", "up", "down"] = "none"

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array) -> jax.Array:
        """x (B, H, W, in), emb (B, E) -> (B, H', W', features)."""
        s = self.settings
        h = gelu(s.norm("norm1")(x))
        if self.resample != "none":
            change_size = upsample if self.resample == "up" else downsample
            h, x = change_size(h), change_size(x)
        h = Conv(self.features, dtype=s.dtype, name="conv1")(h)
        emb = emb if s.skip_time_act else gelu(emb)
        scale, shift = jnp.split(Dense(2 * self.features, dtype=s.dtype, name="time_emb_proj")(emb), 2, axis=-1)
        h = gelu(s.norm("norm2")(h, film=(scale, shift)))
        h = Conv(self.features, kernel_init=ZEROS, dtype=s.dtype, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = Conv(self.features, size=1, dtype=s.dtype, name="conv_shortcut")(x)
        out = x + h
        return out if self.out_scale == 1 else out / self.out_scale


class AttentionBlock(nn.Module):
    """Image tokens attend to the text and (unless `only_cross_attention`) to each other, in one softmax."""

    settings: BlockSettings

    @nn.compact
    def __call__(self, x: jax.Array, text: jax.Array) -> jax.Array:
        """x (B, H, W, C), text (B, L, D) -> (B, H, W, C)."""
        s, channels = self.settings, x.shape[-1]

        def project(name: str, tokens: jax.Array) -> jax.Array:
            return Dense(channels, axes=("in", "heads"), dtype=s.dtype, name=name)(tokens)

        tokens = GroupNorm(s.num_groups, dtype=s.dtype, name="group_norm")(x).reshape(x.shape[0], -1, channels)
        text = GroupNorm(TEXT_GROUPS, dtype=s.dtype, name="norm_cross")(text)  # over all L tokens of each group
        query = project("to_q", tokens)
        key, value = project("add_k_proj", text), project("add_v_proj", text)
        if not s.only_cross_attention:
            key = jnp.concatenate([key, project("to_k", tokens)], axis=1)
            value = jnp.concatenate([value, project("to_v", tokens)], axis=1)
        out = attention(query, key, value, channels // s.head_dim, scale=s.head_dim**-0.5)
        out = Dense(channels, axes=("heads", "out"), kernel_init=ZEROS, dtype=s.dtype, name="to_out_0")(out)
        return x + out.reshape(x.shape)


class DownLevel(nn.Module):
    """Residual blocks (with attention or without) at one resolution, then a downsampling one (last level: none)."""

    features: int
    num_layers: int
    attend: bool
    downsample: bool
    settings: BlockSettings
    out_scale: float

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array, text: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """-> (x, the skips in the order they were made)."""
        res_block, attention_block = recomputed_blocks(self.settings)
        skips = []
        for i in range(self.num_layers):
            x = res_block(self.features, self.settings, self.out_scale, name=f"resnets_{i}")(x, emb)
            if self.attend:
                x = attention_block(self.settings, name=f"attentions_{i}")(x, text)
            skips.append(x)
        if self.downsample:
            x = res_block(self.features, self.settings, self.out_scale, "down", name="downsamplers_0")(x, emb)
            skips.append(x)
        return x, tuple(skips)


class MidLevel(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    settings: BlockSettings
    out_scale: float

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array, text: jax.Array) -> jax.Array:
        res_block, attention_block = recomputed_blocks(self.settings)
        features = x.shape[-1]
        x = res_block(features, self.settings, self.out_scale, name="resnets_0")(x, emb)
        x = attention_block(self.settings, name="attentions_0")(x, text)
        return res_block(features, self.settings, self.out_scale, name="resnets_1")(x, emb)


class UpLevel(nn.Module):
    """One residual block per skip (with attention or without), then an upsampling one (last level: none)."""

    features: int
    attend: bool
    upsample: bool
    settings: BlockSettings
    out_scale: float

    @nn.compact
    def __call__(self, x: jax.Array, skips: tuple[jax.Array, ...], emb: jax.Array, text: jax.Array) -> jax.Array:
        """`skips` in the order they are used, the last one made first."""
        res_block, attention_block = recomputed_blocks(self.settings)
        for i, skip in enumerate(skips):
            x = jnp.concatenate([x, skip], axis=-1)
            x = res_block(self.features, self.settings, self.out_scale, name=f"resnets_{i}")(x, emb)
            if self.attend:
                x = attention_block(self.settings, name=f"attentions_{i}")(x, text)
        if self.upsample:
            x = res_block(self.features, self.settings, self.out_scale, "up", name="upsamplers_0")(x, emb)
        return x


class StepEmbedding(nn.Module):
    """Two-layer perceptron on a sinusoid: (B, D) -> (B, features)."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = gelu(Dense(self.features, dtype=self.dtype, name="linear_1")(x))
        return Dense(self.features, dtype=self.dtype, name="linear_2")(x)


class TextEmbedding(nn.Module):
    """Pools the raw text states into the step embedding: (B, L, D) -> (B, features). Pads take part."""

    features: int
    num_heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        text = LayerNorm(dtype=self.dtype, name="norm1")(text)
        pooled = AttentionPool(self.num_heads, self.dtype, name="pool")(text)
        pooled = Dense(self.features, dtype=self.dtype, name="proj")(pooled)
        return LayerNorm(dtype=self.dtype, name="norm2")(pooled)


class AttentionPool(nn.Module):
    """The mean token attends to itself and all others: (B, L, D) -> (B, D). There is no output projection."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dim = x.shape[-1]
        position = self.param("positional_embedding", nn.initializers.normal(dim**-0.5), (1, dim))
        mean_token = x.mean(axis=1, keepdims=True) + position.astype(x.dtype)  # (B, 1, D)
        tokens = jnp.concatenate([mean_token, x], axis=1)

        def project(name: str, tokens: jax.Array) -> jax.Array:
            return Dense(dim, axes=("in", "heads"), dtype=self.dtype, name=name)(tokens)

        query, key, value = project("q_proj", mean_token), project("k_proj", tokens), project("v_proj", tokens)
        return attention(query, key, value, self.num_heads, scale=(dim // self.num_heads) ** -0.5)[:, 0]


def recomputed_blocks(settings: BlockSettings) -> tuple[type[nn.Module], type[nn.Module]]:
    """Residual and attention block, recomputed in the backward pass as the settings say.

    Args:
      settings: whose `remat` says so: "blocks" all of them, "dots" all but convolutions and products.
    """
    if settings.remat != "none":
        policy = _keep_products if settings.remat == "dots" else None
        return nn.remat(ResBlock, policy=policy), nn.remat(AttentionBlock, policy=policy)
    return ResBlock, AttentionBlock


def _keep_products(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name in ("conv_general_dilated", "dot_general")
