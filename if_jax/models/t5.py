"""The encoder of T5 v1.1 (Raffel et al. 2020, arXiv:1910.10683; gated GELU, no biases, no 1/sqrt(d) in attention).

Module names are those of transformers' `T5EncoderModel`, with `_i` for its `.i`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from if_jax.models.layers import Dense, Embed, RMSNorm, attention


@dataclass(frozen=True)
class T5Config:
    """Shape of a T5 encoder; field names are those of transformers' `T5Config`."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


class T5Encoder(nn.Module):
    """Token ids to text states. float32 or bfloat16; the larger T5s overflow in float16."""

    config: T5Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Encode captions.

        Args:
          ids: (B, L) int.
          mask: (B, L), 1 = token, 0 = pad.

        Returns:
          (B, L, d_model) float32; rows of pads are not zeroed.
        """
        x = Embed(self.config.vocab_size, self.config.d_model, dtype=self.dtype, name="shared")(ids)
        return T5Stack(self.config, self.dtype, name="encoder")(x, mask).astype(jnp.float32)


class T5Stack(nn.Module):
    """The layers above the token embedding."""

    config: T5Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        hidden = jnp.where(mask[:, None, None, :] > 0, 0.0, jnp.finfo(jnp.float32).min)  # (B, 1, 1, L)
        bias = None
        for i in range(self.config.num_layers):
            x, bias = T5Block(self.config, self.dtype, name=f"block_{i}")(x, bias, hidden)
        return RMSNorm(self.config.layer_norm_epsilon, self.dtype, name="final_layer_norm")(x)


class T5Block(nn.Module):
    """Attention and feed-forward, both pre-norm and residual. The first block makes the position bias of all."""

    config: T5Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array | None, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, bias = T5AttentionLayer(self.config, self.dtype, name="layer_0")(x, bias, hidden)
        return T5FeedForwardLayer(self.config, self.dtype, name="layer_1")(x), bias


class T5AttentionLayer(nn.Module):
    """x + attention(norm(x))."""

    config: T5Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array | None, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        normed = RMSNorm(self.config.layer_norm_epsilon, self.dtype, name="layer_norm")(x)
        attend = T5Attention(self.config, self.dtype, name="SelfAttention")
        out, bias = attend(normed, bias, hidden)
        return x + out, bias


class T5Attention(nn.Module):
    """Self-attention with a learned bias per head and bucket of relative position; logits are not scaled."""

    config: T5Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array | None, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        c = self.config
        inner = c.num_heads * c.d_kv
        query = _dense(inner, (c.d_model * c.d_kv) ** -0.5, ("in", "heads"), self.dtype, "q")(x)
        key = _dense(inner, c.d_model**-0.5, ("in", "heads"), self.dtype, "k")(x)
        value = _dense(inner, c.d_model**-0.5, ("in", "heads"), self.dtype, "v")(x)
        if bias is None:  # the first block
            bias = self._position_bias(x.shape[1])
        out = attention(query, key, value, c.num_heads, scale=1.0, bias=bias + hidden)
        return _dense(c.d_model, inner**-0.5, ("heads", "out"), self.dtype, "o")(out), bias

    def _position_bias(self, length: int) -> jax.Array:
        """(1, heads, L, L) float32, to be added to the logits."""
        c = self.config
        position = np.arange(length)
        buckets = relative_buckets(
            position[None, :] - position[:, None], c.relative_attention_num_buckets, c.relative_attention_max_distance
        )
        init = nn.initializers.normal(c.d_model**-0.5)
        table = Embed(
            c.relative_attention_num_buckets, c.num_heads, (None, "heads"), init, name="relative_attention_bias"
        )
        return table(jnp.asarray(buckets)).transpose(2, 0, 1)[None]


class T5FeedForwardLayer(nn.Module):
    """x + feed_forward(norm(x))."""

    config: T5Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        normed = RMSNorm(self.config.layer_norm_epsilon, self.dtype, name="layer_norm")(x)
        return x + T5FeedForward(self.config, self.dtype, name="DenseReluDense")(normed)


class T5FeedForward(nn.Module):
    """wo(gelu(wi_0 x) * wi_1 x), with the tanh form of GELU (Shazeer 2020, arXiv:2002.05202)."""

    config: T5Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        gate = _dense(c.d_ff, c.d_model**-0.5, ("in", "mlp"), self.dtype, "wi_0")(x)
        linear = _dense(c.d_ff, c.d_model**-0.5, ("in", "mlp"), self.dtype, "wi_1")(x)
        hidden = jax.nn.gelu(gate, approximate=True) * linear
        return _dense(c.d_model, c.d_ff**-0.5, ("mlp", "out"), self.dtype, "wo")(hidden)


def relative_buckets(offset: np.ndarray, num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of each offset between positions: half the buckets per direction, exact near, logarithmic far.

    With 32 buckets and distance 128: offsets 0-7 have their own, the next eight grow to 128, the last takes the rest.

    Args:
      offset: key - query, int of any shape.
      num_buckets: even.
      max_distance: from here on all offsets share the last bucket.

    Returns:
      int32 of the shape of offset.
    """
    per_direction = num_buckets // 2
    exact = per_direction // 2
    distance = np.abs(offset)
    # The maximum only avoids log(0), whose result is not used. float32 as in the reference: bucket edges depend on it.
    ratio = np.log(np.maximum(distance, exact).astype(np.float32) / exact) / math.log(max_distance / exact)
    far = exact + (ratio * (per_direction - exact)).astype(np.int32)
    bucket = np.where(distance < exact, distance, np.minimum(far, per_direction - 1))
    return (bucket + np.where(offset > 0, per_direction, 0)).astype(np.int32)


def _dense(features: int, std: float, axes: tuple[str, str], dtype: jnp.dtype, name: str) -> Dense:
    """A linear layer as T5 has it: no bias, normal start of the given standard deviation."""
    init = nn.initializers.normal(std)
    return Dense(features, use_bias=False, axes=axes, kernel_init=init, dtype=dtype, name=name)
