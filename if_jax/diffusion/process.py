"""The diffusion process: noising, its posterior, and conversions between what networks predict.

    (1)  x_t = √ᾱ_t x0 + √(1 − ᾱ_t) ε,   ε ~ N(0, I)
    (2)  v   = √ᾱ_t ε − √(1 − ᾱ_t) x0
    (3)  q(x_{t−1} | x_t, x0) = N(c_0 x0 + c_t x_t, β̃_t I)          (coefficients: schedule.py)
    (4)  ln σ² = r ln β_t + (1 − r) ln β̃_t,   r = (v_σ + 1) / 2

Everywhere images are (B, H, W, C) float32 and t is (B,) int: an index into the tables of the schedule, which for the
training chain is the timestep itself and for a respaced chain is not (the network then sees schedule.timesteps[t]).

Sources: Ho et al. 2020 (arXiv:2006.11239), eqs. 4, 6, 7; Salimans & Ho 2022 (arXiv:2202.00512), appendix D, for v;
Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 15, for the learned variance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from if_jax.diffusion.schedule import Array, Schedule

Network = Callable[[jax.Array, jax.Array], jax.Array]  # (x_t (B, H, W, C), t (B,)) -> its output
Prediction = Literal["eps", "v", "x0"]  # what the first C channels of a model output mean


def add_noise(schedule: Schedule, x0: Array, t: Array, eps: Array) -> jax.Array:
    """Noise pictures: x_t of equation (1)."""
    return _at(schedule.sqrt_alpha_bar, t) * x0 + _at(schedule.sqrt_one_minus_alpha_bar, t) * eps


def noise_and_predict(
    schedule: Schedule,
    network: Network,
    x0: Array,
    t: Array,
    eps: Array,
    low_res: Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Noises pictures and asks a network about them: what losses and gradients through a network start from.

    Args:
      schedule: the training chain.
      network: what is asked.
      x0: pictures (B, H, W, 3).
      t: timesteps (B,).
      eps: noise (B, H, W, 3).
      low_res: pictures (B, H, W, 3) that the network sees in more channels beside x_t.

    Returns:
      x_t (B, H, W, 3), and the network's output.
    """
    x_t = add_noise(schedule, x0, t, eps)
    return x_t, network(x_t if low_res is None else jnp.concatenate([x_t, low_res], -1), jnp.asarray(t))


def sample_noise(seed: int, samples: jax.Array, purpose: int | jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Noise (B, *shape) that depends on the seed, each sample's number (B,) and the purpose alone, not on the batch."""
    key, fold_in = jax.random.key(seed), jax.random.fold_in
    return jax.vmap(lambda n: jax.random.normal(fold_in(fold_in(key, n), purpose), shape))(samples)


def x0_from_eps(schedule: Schedule, x_t: Array, t: Array, eps: Array) -> jax.Array:
    """x0 from the noise in x_t, by (1). Ill-conditioned at the noisy end: 1/√ᾱ_999 = 20291."""
    return (jnp.asarray(x_t) - _at(schedule.sqrt_one_minus_alpha_bar, t) * eps) / _at(schedule.sqrt_alpha_bar, t)


def eps_from_x0(schedule: Schedule, x_t: Array, t: Array, x0: Array) -> jax.Array:
    """The noise in x_t from x0, by (1). Ill-conditioned at the clean end."""
    return (jnp.asarray(x_t) - _at(schedule.sqrt_alpha_bar, t) * x0) / _at(schedule.sqrt_one_minus_alpha_bar, t)


def v_from_x0_eps(schedule: Schedule, x0: Array, t: Array, eps: Array) -> jax.Array:
    """The velocity v of equation (2)."""
    return _at(schedule.sqrt_alpha_bar, t) * eps - _at(schedule.sqrt_one_minus_alpha_bar, t) * x0


def x0_from_v(schedule: Schedule, x_t: Array, t: Array, v: Array) -> jax.Array:
    """x0 from the velocity: (1) and (2) are a rotation, which is inverted by its transpose."""
    return _at(schedule.sqrt_alpha_bar, t) * x_t - _at(schedule.sqrt_one_minus_alpha_bar, t) * v


def x0_from_prediction(schedule: Schedule, prediction: Prediction, x_t: Array, t: Array, predicted: Array) -> jax.Array:
    """x0 from what the network predicts.

    Args:
      schedule: the chain that t indexes.
      prediction: what `predicted` means.
      x_t: (B, H, W, C).
      t: (B,) int.
      predicted: (B, H, W, C).

    Raises:
      ValueError: for a prediction that is not one of `Prediction`.
    """
    _check(prediction)
    if prediction == "x0":
        return jnp.asarray(predicted)
    return (x0_from_eps if prediction == "eps" else x0_from_v)(schedule, x_t, t, predicted)


def prediction_from_x0(schedule: Schedule, prediction: Prediction, x_t: Array, t: Array, x0: Array) -> jax.Array:
    """The inverse of x0_from_prediction: what a network would have predicted at x_t to mean x0."""
    _check(prediction)
    if prediction == "x0":
        return jnp.asarray(x0)
    eps = eps_from_x0(schedule, x_t, t, x0)
    return eps if prediction == "eps" else v_from_x0_eps(schedule, x0, t, eps)


def prediction_target(schedule: Schedule, prediction: Prediction, x0: Array, t: Array, eps: Array) -> jax.Array:
    """What the network should have predicted for x_t made of x0 and eps; raises as `x0_from_prediction`."""
    _check(prediction)
    return {"eps": jnp.asarray(eps), "x0": jnp.asarray(x0), "v": v_from_x0_eps(schedule, x0, t, eps)}[prediction]


def posterior(schedule: Schedule, x0: Array, x_t: Array, t: Array) -> tuple[jax.Array, jax.Array]:
    """Mean (B, H, W, C) and log variance (B, 1, 1, 1) of q(x_{t−1} | x_t, x0), equation (3).

    At index 0 the variance is 0; its logarithm is replaced by that of index 1.
    """
    mean = _at(schedule.posterior_coef_x0, t) * x0 + _at(schedule.posterior_coef_xt, t) * x_t
    return mean, _at(schedule.posterior_log_variance, t)


def learned_range_log_variance(schedule: Schedule, v: Array, t: Array) -> jax.Array:
    """ln σ² (B, H, W, C) of equation (4) from the variance channels v of a model output.

    v = −1 gives the posterior variance β̃, v = 1 gives β; it is not clamped, as in IF.
    """
    r = (jnp.asarray(v) + 1) / 2
    return r * _at(schedule.log_beta, t) + (1 - r) * _at(schedule.posterior_log_variance, t)


def split_model_output(model_output: Array) -> tuple[jax.Array, jax.Array]:
    """(B, H, W, 2C) → the prediction (ε, or the velocity) and the variance channels, each (B, H, W, C)."""
    predicted, variance = jnp.split(model_output, 2, axis=-1)
    return predicted, variance


def _check(prediction: str) -> None:
    if prediction not in get_args(Prediction):
        raise ValueError(f"prediction is {prediction!r}: use one of {', '.join(get_args(Prediction))}")


def _at(table: Array, t: Array) -> jax.Array:
    """table[t] shaped (B, 1, 1, 1), to multiply images."""
    return jnp.asarray(table)[t].reshape(-1, 1, 1, 1)
