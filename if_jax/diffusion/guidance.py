"""Pushing a sample towards its caption: classifier-free guidance, and thresholding against what it does to colours.

    (1)  ε̂ = ε_u + w (ε_c − ε_u)            w = 1: conditional, w > 1: more like the caption than the data are
    (2)  s = clamp(quantile_p(|x0|), 1, c)   x0' = clamp(x0, −s, s) / s
    (3)  ε̂ = ε_u + w ((1 − m) ε_c + m ε_p − ε_u)
    (4)  x̂0 = x_c + (w − 1) (Δ⊥ + η Δ∥),   Δ = (x_c − x_u) min(1, r / ‖x_c − x_u‖),   Δ∥ = ⟨Δ, x_c⟩ x_c / ‖x_c‖²

(1) reads the same for a net that predicts the velocity: at a given x_t the two are linear in one another. (3) is IF's
positive mixer: a share m of a second caption, the style. (4) is adaptive projected guidance on predictions of x0: the
part of the push that is parallel to x_c makes colours loud, and is scaled down (η) or left out (η = 0). Its reverse
momentum is left out: a denoiser is a function of x_t and t alone. η = 1 and r = ∞ give (1).

Sources: Ho & Salimans 2022 (arXiv:2207.12598), in IF's convention for w; Saharia et al. 2022 (arXiv:2205.11487),
section 2.3, for (2); the ceiling c on s is IF's; Sadat et al. 2024 (arXiv:2410.02416), section 4, for (4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from if_jax.diffusion.process import Prediction, prediction_from_x0, split_model_output, x0_from_prediction
from if_jax.diffusion.schedule import Array, Schedule

# (x_t (B, H, W, C), t (B,) int32, a timestep of the training chain) → prediction and variance channels (B, H, W, 2C)
Denoiser = Callable[[jax.Array, jax.Array], jax.Array]
# The same with conditioning: an array or any pytree of arrays whose first axis is the batch
ConditionalNet = Callable[[jax.Array, jax.Array, Any], jax.Array]
# Predictions (B, H, W, C) of the branches, first conditional, last unconditional; x_t; t → the guided prediction
Combine = Callable[[Sequence[jax.Array], jax.Array, jax.Array], jax.Array]


def guided(net: ConditionalNet, branches: Sequence[Any], combine: Combine) -> Denoiser:
    """The denoiser that runs net once on all branches, a batch of K B rows, and combines what they predict.

    The rows of one picture stand together, so that a batch split over devices needs no exchange between them. The
    variance channels come from the conditional branch unchanged, as in IF.

    Args:
      net: the network.
      branches: K pytrees of one structure, arrays (B, …) each: conditional first, unconditional last; first axes of 1
        are repeated B times.
      combine: K predictions to one: `classifier_free` or `projected`.
    """

    def interleave(*rows: jax.Array) -> jax.Array:
        batch = max(row.shape[0] for row in rows)
        same = [jnp.broadcast_to(row, (batch, *row.shape[1:])) for row in rows]
        return jnp.stack(same, axis=1).reshape(-1, *rows[0].shape[1:])

    together = jax.tree.map(interleave, *branches)

    def denoise(x_t: jax.Array, t: jax.Array) -> jax.Array:
        count = len(branches)
        out = net(jnp.repeat(x_t, count, axis=0), jnp.repeat(t, count, axis=0), together)
        out = out.astype(jnp.float32).reshape(-1, count, *out.shape[1:])
        predicted, variance = split_model_output(out)
        combined = combine([predicted[:, k] for k in range(count)], x_t, t)
        return jnp.concatenate([combined, variance[:, 0]], axis=-1)

    return denoise


def with_fixed_variance(denoise: Denoiser) -> Denoiser:
    """The denoiser with the posterior variance in place of the one it predicts: diffusers' `fixed_small`.

    Nets that were fine-tuned without the variational bound say of their variance what they said before, or less.
    """

    def fixed(x_t: jax.Array, t: jax.Array) -> jax.Array:
        predicted, variance = split_model_output(denoise(x_t, t))
        return jnp.concatenate([predicted, -jnp.ones_like(variance)], axis=-1)

    return fixed


def classifier_free(weight: float | Array, positive_mixer: float | Array = 0.0) -> Combine:
    """Classifier-free guidance: equation (1) for two branches, (3) for three (conditional, positive, unconditional).

    Args:
      weight: w, the guidance scale; a scalar or (B,), it may be traced.
      positive_mixer: m, the share of the positive branch; a scalar or (B,), it may be traced.
    """
    w, m = _column(weight), _column(positive_mixer)

    def combine(predicted: Sequence[jax.Array], x_t: jax.Array, t: jax.Array) -> jax.Array:
        cond, uncond = _mixed(predicted, m)
        return uncond + w * (cond - uncond)

    return combine


def projected(
    weight: float | Array,
    schedule: Schedule,
    prediction: Prediction,
    parallel: float | Array = 0.0,
    norm: float | Array = jnp.inf,
    positive_mixer: float | Array = 0.0,
) -> Combine:
    """Adaptive projected guidance, equation (4).

    Args:
      weight: w, as in `classifier_free`.
      schedule: the training chain.
      prediction: what the net predicts.
      parallel: η, a scalar or (B,); it may be traced.
      norm: r, the largest root mean square of Δ over a picture (the paper's r is a norm over a latent of fixed size;
        ours does not depend on the size of the picture). A scalar or (B,); it may be traced.
      positive_mixer: m, as in `classifier_free`.
    """
    w, m, eta, r = _column(weight), _column(positive_mixer), _column(parallel), _column(norm)

    def combine(predicted: Sequence[jax.Array], x_t: jax.Array, t: jax.Array) -> jax.Array:
        cond, uncond = (x0_from_prediction(schedule, prediction, x_t, t, p) for p in _mixed(predicted, m))
        push = cond - uncond
        push = push * jnp.minimum(1, r / jnp.maximum(jnp.sqrt(_mean(push * push)), 1e-12))
        along = _mean(push * cond) / jnp.maximum(_mean(cond * cond), 1e-12) * cond
        x0 = cond + (w - 1) * (push - along + eta * along)
        return prediction_from_x0(schedule, prediction, x_t, t, x0)

    return combine


def dynamic_threshold(x0: jax.Array, ratio: float | Array = 0.95, max_value: float | Array = 1.5) -> jax.Array:
    """Dynamic thresholding: x0' of equation (2), for each image by itself.

    With c = 1, as super-resolution stages have it, s = 1 whatever the quantile, and the sort that it takes is spared.

    Args:
      x0: (B, H, W, C).
      ratio: p, the quantile; it may be traced.
      max_value: c ≥ 1, the ceiling; it may be traced.

    Returns:
      (B, H, W, C) in [−1, 1].

    Raises:
      ValueError: for a ceiling below 1 that is known while tracing.
    """
    if isinstance(max_value, int | float) and max_value < 1:
        raise ValueError(f"sample_max_value is {max_value}: use 1.0 (plain clipping) or more")

    def threshold(x0: jax.Array) -> jax.Array:
        magnitude = jnp.abs(x0).reshape(x0.shape[0], -1)
        s = jnp.clip(jnp.quantile(magnitude, ratio, axis=1), 1, max_value).reshape(-1, 1, 1, 1)
        return jnp.clip(x0, -s, s) / s

    return jax.lax.cond(jnp.asarray(max_value) > 1, threshold, lambda x0: jnp.clip(x0, -1, 1), x0)


def _mixed(predicted: Sequence[jax.Array], m: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The conditional prediction, with its share of the positive one where there is one, and the unconditional."""
    if len(predicted) == 2:
        return predicted[0], predicted[1]
    cond, positive, uncond = predicted
    return (1 - m) * cond + m * positive, uncond


def _column(value: float | Array) -> jax.Array:
    return jnp.asarray(value, jnp.float32).reshape(-1, 1, 1, 1)


def _mean(image: jax.Array) -> jax.Array:
    return image.mean(axis=(1, 2, 3), keepdims=True)
