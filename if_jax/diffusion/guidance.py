"""Pushing a sample towards its caption: classifier-free guidance, and thresholding against what it does to colours.

    (1)  ε̂ = ε_u + w (ε_c − ε_u)            w = 1: conditional, w > 1: more like the caption than the data are
    (2)  s = clamp(quantile_p(|x0|), 1, c)   x0' = clamp(x0, −s, s) / s

(1) reads the same for a net that predicts the velocity: at a given x_t the two are linear in one another.

Sources: Ho & Salimans 2022 (arXiv:2207.12598), in IF's convention for w; Saharia et al. 2022 (arXiv:2205.11487),
section 2.3, for (2); the ceiling c on s is IF's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from if_jax.diffusion.process import split_model_output

# (x_t (B, H, W, C), t (B,) int32, a timestep of the training chain) → prediction and variance channels (B, H, W, 2C)
Denoiser = Callable[[jax.Array, jax.Array], jax.Array]
# The same with conditioning: an array or any pytree of arrays whose first axis is the batch
ConditionalNet = Callable[[jax.Array, jax.Array, Any], jax.Array]


def guided(net: ConditionalNet, cond: Any, uncond: Any, weight: float | jax.Array) -> Denoiser:
    """The guided denoiser of equation (1): net runs once, on the batch [cond, uncond] of 2B.

    cond is a pytree of arrays (B, …): text states, and for super-resolution whatever else the network is shown, since
    its batch doubles as well. uncond has the same structure; first axes of 1 are repeated B times.
    weight is a scalar or (B,) and may be traced. The variance channels come from the conditional half unchanged.
    """
    both = jax.tree.map(lambda c, u: jnp.concatenate([c, jnp.broadcast_to(u, c.shape)]), cond, uncond)
    w = jnp.asarray(weight, jnp.float32).reshape(-1, 1, 1, 1)

    def denoise(x_t: jax.Array, t: jax.Array) -> jax.Array:
        out = net(jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t]), both)
        out_c, out_u = jnp.split(out.astype(jnp.float32), 2)
        eps_c, variance_c = split_model_output(out_c)
        eps_u, _ = split_model_output(out_u)
        return jnp.concatenate([eps_u + w * (eps_c - eps_u), variance_c], axis=-1)

    return denoise


def dynamic_threshold(x0: jax.Array, ratio: float = 0.95, max_value: float | jax.Array = 1.5) -> jax.Array:
    """x0' of equation (2) in [−1, 1], for each image of x0 (B, H, W, C) by itself; p = ratio, c = max_value ≥ 1."""
    if isinstance(max_value, int | float):
        if max_value < 1:
            raise ValueError(f"sample_max_value is {max_value}: use 1.0 (plain clipping) or more")
        if max_value == 1:  # s = 1 whatever the quantile: spare super-resolution stages the sort
            return jnp.clip(x0, -1, 1)
    magnitude = jnp.abs(x0).reshape(x0.shape[0], -1)
    s = jnp.clip(jnp.quantile(magnitude, ratio, axis=1), 1, max_value).reshape(-1, 1, 1, 1)
    return jnp.clip(x0, -s, s) / s
