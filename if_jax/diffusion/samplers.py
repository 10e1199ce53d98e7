"""Drawing images: the reverse process as plain functions over one denoiser signature.

All samplers walk a chain from its noisy end, index by index, and share what comes first:

    (1)  x̂0 = (x_t − √(1 − ᾱ_t) ε̂) / √ᾱ_t (or √ᾱ_t x_t − √(1 − ᾱ_t) v̂ of a net that predicts v), then thresholded

They differ in how they go on, with ᾱ' = ᾱ_{t−1} and z ~ N(0, I):

    ddpm    (2)  x_{t−1} = c_0 x̂0 + c_t x_t + [t > 0] σ z,   σ² from the variance channels
    ddim    (3)  x_{t−1} = √ᾱ' x̂0 + √(1 − ᾱ' − σ²) ε̂ + σ z,   σ² = η² (1 − ᾱ')/(1 − ᾱ_t) (1 − ᾱ_t/ᾱ')
    dpm++   (4)  x_{t−1} = (σ'/σ_t) x_t + √ᾱ' (1 − e^{−h}) D,   D = x̂0 + h/(2 h_last) (x̂0 − x̂0 of the step before)
                 with σ = √(1 − ᾱ), λ = ln √ᾱ − ln σ, h = λ' − λ_t; D = x̂0 in the first step and in the last

Every image owns a key, and its noise at a timestep is a function of that key and the timestep alone. So an image does
not depend on the batch it is drawn in, nor on how the batch is spread over devices.

Sources: ddpm: Ho et al. 2020 (arXiv:2006.11239), algorithm 2, with the learned σ² of process.py. ddim: Song et al. 2020
(arXiv:2010.02502), eqs. 12 and 16. dpm++: Lu et al. 2022 (arXiv:2211.01095), algorithm 2 (2M), whose last step goes to
ᾱ' = 1. Thresholding: guidance.py.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from if_jax.diffusion.guidance import Denoiser, dynamic_threshold
from if_jax.diffusion.process import (
    Prediction,
    eps_from_x0,
    learned_range_log_variance,
    posterior,
    split_model_output,
    x0_from_prediction,
)
from if_jax.diffusion.schedule import Array, Schedule

SamplerName = Literal["ddpm", "ddim", "dpm++"]  # IF's word for it is `sample_loop`
SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)
_INITIAL = 2**31 - 1  # what the key of an image is folded with for x_T; no timestep is this large


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SamplerState:
    """Where a sampler stands; it may be stopped after any step and go on from here, to the same picture."""

    x: jax.Array  # (B, H, W, C) float32, x_t
    x0: jax.Array  # (B, H, W, C) float32, thresholded x̂0 of the step before
    index: jax.Array  # () int32, of the schedule: the next step to take; −1: finished
    done: jax.Array  # () int32, steps taken


class Step(NamedTuple):
    """What a sampler's own equation reads: one index of the schedule and what the net said there."""

    i: jax.Array  # (B,) int32, all equal
    state: SamplerState
    x0: jax.Array  # thresholded
    eps: jax.Array  # ε̂ that the net's prediction means, before thresholding
    v: jax.Array  # variance channels
    z: jax.Array  # noise of this step


Noise = Callable[[jax.Array], jax.Array]  # index of the schedule → z (B, H, W, C)
Update = Callable[[Schedule, Step], jax.Array]


def start(x: Array, index: int | jax.Array) -> SamplerState:
    """The state before the first step.

    Args:
      x: (B, H, W, C), x_T, or a picture that is drawn over, noised.
      index: of the schedule, the first step: its last one, or less for a picture that is drawn over.
    """
    x_start = jnp.asarray(x, jnp.float32)
    return SamplerState(x_start, jnp.zeros_like(x_start), jnp.asarray(index, jnp.int32), jnp.zeros((), jnp.int32))


def make_update(sampler: SamplerName, eta: float | Array = 0.0, clipped_eps: bool = False) -> Update:
    """The equation by which a sampler goes on, for `run_sampler`.

    Args:
      sampler: "ddpm": ancestral sampling with learned variance, equation (2). "ddim": equation (3). "dpm++":
        DPM-Solver++ (2M), equation (4), which draws no noise.
      eta: of ddim: 0 draws no noise, 1 as much as DDPM with its lower variance.
      clipped_eps: of ddim: take ε̂ from the thresholded x̂0, so that the two belong to one x_t, as IF's own code does;
        diffusers' pipelines take the net's own.
    """
    ddim = functools.partial(ddim_update, eta=eta, clipped_eps=clipped_eps)
    updates: dict[SamplerName, Update] = {"ddpm": ddpm_update, "ddim": ddim, "dpm++": dpm_update}
    return updates[sampler]


def run_sampler(
    update: Update,
    denoise: Denoiser,
    schedule: Schedule,
    state: SamplerState,
    count: int | jax.Array,
    noise: Noise,
    *,
    mask: Array | None = None,
    prediction: Prediction = "eps",
    sample_max_value: float | Array = 1.5,
    threshold_ratio: float | Array = 0.95,
) -> SamplerState:
    """Take steps down the schedule from where `state` stands, as one loop.

    Args:
      update: of `make_update`.
      denoise: x_t (B, H, W, C), t (B,) → prediction and variance channels (B, H, W, 2C).
      schedule: may be longer than the chain (`schedule.padded`).
      state: see `start`.
      count: how many steps. An int makes a scan, which can be differentiated; traced, any number of steps is one
        compiled program.
      noise: see `keyed_noise` and `array_noise`.
      mask: (B, H, W, 1), 1 where to draw, 0 where x stays as `state` has it, at every step (IF's inpainting).
      prediction: what the first C channels of the denoiser mean.
      sample_max_value: c of `guidance.dynamic_threshold`.
      threshold_ratio: p of it.

    Returns:
      The state after them. Its x is not clamped; once finished, it is x̂0 up to rounding.
    """
    timesteps, drawn = jnp.asarray(schedule.timesteps), None if mask is None else jnp.asarray(mask)

    def body(_: jax.Array, state: SamplerState) -> SamplerState:
        i = jnp.full((state.x.shape[0],), state.index)
        predicted, v = split_model_output(denoise(state.x, timesteps[i]).astype(jnp.float32))
        raw = x0_from_prediction(schedule, prediction, state.x, i, predicted)
        eps = predicted if prediction == "eps" else eps_from_x0(schedule, state.x, i, raw)
        x0 = dynamic_threshold(raw, threshold_ratio, sample_max_value)
        x = update(schedule, Step(i, state, x0, eps, v, noise(state.index)))
        if drawn is not None:
            x = (1 - drawn) * state.x + drawn * x
        return SamplerState(x, x0, state.index - 1, state.done + 1)

    return jax.lax.fori_loop(0, count, body, state)


def ddpm_update(schedule: Schedule, step: Step) -> jax.Array:
    """x_{t−1} of equation (2)."""
    mean, _ = posterior(schedule, step.x0, step.state.x, step.i)
    sigma = jnp.exp(0.5 * learned_range_log_variance(schedule, step.v, step.i))
    # Chosen, not multiplied by [t > 0]: an overflowing σ must not reach the finished image as 0 · ∞.
    return mean + jnp.where((step.i > 0).reshape(-1, 1, 1, 1), sigma * step.z, 0.0)


def ddim_update(schedule: Schedule, step: Step, eta: float | Array = 0.0, clipped_eps: bool = False) -> jax.Array:
    """x_{t−1} of equation (3)."""
    variance = _at(schedule.posterior_variance, step.i) * jnp.square(eta)
    eps = eps_from_x0(schedule, step.state.x, step.i, step.x0) if clipped_eps else step.eps
    towards = jnp.sqrt(jnp.maximum(_at(schedule.one_minus_alpha_bar_prev, step.i) - variance, 0.0))
    mean = jnp.sqrt(_at(schedule.alpha_bar_prev, step.i)) * step.x0 + towards * eps
    return mean + jnp.where((step.i > 0).reshape(-1, 1, 1, 1), jnp.sqrt(variance) * step.z, 0.0)


def dpm_update(schedule: Schedule, step: Step) -> jax.Array:
    """x_{t−1} of equation (4); at index 0, where σ' = 0, it is x̂0."""
    log_snr = jnp.log(jnp.asarray(schedule.sqrt_alpha_bar)) - jnp.log(jnp.asarray(schedule.sqrt_one_minus_alpha_bar))
    i, last = step.i, jnp.maximum(step.i - 1, 0)
    here, after = _at(log_snr, i), _at(log_snr, last)
    before = _at(log_snr, jnp.minimum(i + 1, schedule.num_steps - 1))
    h, h_last = after - here, here - before
    second_order = (step.state.done > 0) & (i > 0).reshape(-1, 1, 1, 1)
    ratio = jnp.where(second_order, h / (2 * jnp.where(second_order, h_last, 1.0)), 0.0)
    estimate = step.x0 + ratio * (step.x0 - step.state.x0)
    sigma, sigma_after = _at(schedule.sqrt_one_minus_alpha_bar, i), _at(schedule.sqrt_one_minus_alpha_bar, last)
    x = sigma_after / sigma * step.state.x - _at(schedule.sqrt_alpha_bar, last) * jnp.expm1(-h) * estimate
    return jnp.where((i > 0).reshape(-1, 1, 1, 1), x, step.x0)


def initial_noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """x_T: standard normal (B, *shape) float32 for B keys."""
    return _normal(keys, _INITIAL, shape)


def keyed_noise(keys: jax.Array, schedule: Schedule, shape: tuple[int, ...]) -> Noise:
    """The noise of each step from the keys of the images and the step's timestep alone.

    Args:
      keys: (B,).
      schedule: whose indices the noise is asked for.
      shape: (H, W, C).

    Returns:
      Index of the schedule → (B, H, W, C) float32.
    """
    timesteps = jnp.asarray(schedule.timesteps)
    return lambda index: _normal(keys, timesteps[index], shape)


def array_noise(steps: Array) -> Noise:
    """The noise of each step out of an array (N, B, H, W, C), row i for index i of the schedule."""
    table = jnp.asarray(steps, jnp.float32)
    return lambda index: table[index]


def _normal(keys: jax.Array, data: int | jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """(B, *shape) standard normal, row b from keys[b] and `data` alone."""
    size = math.prod(shape)  # drawn flat: the same numbers, and they compile four times faster than images do
    flat = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, data), (size,), jnp.float32))(keys)
    return flat.reshape(-1, *shape)


def _at(table: Array, i: jax.Array) -> jax.Array:
    return jnp.asarray(table)[i].reshape(-1, 1, 1, 1)
