"""Drawing images: the reverse process as functions over one denoiser signature.

Ancestral sampling, for index t = N − 1 … 0 of a schedule:

    (1)  x̂0 = (x_t − √(1 − ᾱ_t) ε̂) / √ᾱ_t (or √ᾱ_t x_t − √(1 − ᾱ_t) v̂ of a net that predicts v), then thresholded
    (2)  x_{t−1} = c_0 x̂0 + c_t x_t + [t > 0] σ z,   z ~ N(0, I),   σ² from the variance channels

Every image owns a key, and its noise at a timestep is a function of that key and the timestep alone. So an image does
not depend on the batch it is drawn in, nor on how the batch is spread over devices.

Source: Ho et al. 2020 (arXiv:2006.11239), algorithm 2; thresholding: guidance.py; σ²: process.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from if_jax.diffusion.guidance import Denoiser, dynamic_threshold
from if_jax.diffusion.process import (
    Prediction,
    learned_range_log_variance,
    posterior,
    split_model_output,
    x0_from_prediction,
)
from if_jax.diffusion.schedule import Schedule

_INITIAL = 2**31 - 1  # what the key of an image is folded with for x_T; no timestep is this large


def initial_noise(keys: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """x_T: standard normal (B, *shape) float32 for B keys."""
    return _normal(keys, _INITIAL, shape)


def ancestral(
    denoise: Denoiser,
    schedule: Schedule,
    x_T: jax.Array,
    keys: jax.Array | None,
    *,
    prediction: Prediction = "eps",
    sample_max_value: float | jax.Array = 1.5,
    threshold_ratio: float = 0.95,
    noise: jax.Array | None = None,
    callback: Callable[[jax.Array], None] | None = None,
) -> jax.Array:
    """Run the whole reverse process: x_T (B, H, W, C) → x0 (B, H, W, C) float32, as one `lax.scan`.

    keys: (B,) typed PRNG keys, one for each image. noise: (N, B, H, W, C) replaces what they would draw; its row i
    belongs to schedule index i, and row 0 is not used. The result is not clamped: after thresholding, index 0
    returns x̂0 itself, up to rounding.
    callback, if given, is called on the host with each finished index, in no guaranteed order (progress bars).
    """
    if noise is None and keys is None:
        raise ValueError("ancestral sampling has neither keys nor noise: pass one PRNG key for each image")
    batch = x_T.shape[0]
    timesteps = jnp.asarray(schedule.timesteps)
    noise = None if noise is None else jnp.asarray(noise, jnp.float32)

    def step(x_t: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        z = noise[i] if noise is not None else _normal(keys, timesteps[i], x_t.shape[1:])
        out = denoise(x_t, jnp.full((batch,), timesteps[i]))
        x_prev, _ = ancestral_step(
            schedule,
            out,
            x_t,
            jnp.full((batch,), i),
            z,
            prediction=prediction,
            sample_max_value=sample_max_value,
            threshold_ratio=threshold_ratio,
        )
        if callback is not None:
            jax.debug.callback(callback, i)
        return x_prev, None

    indices = jnp.arange(schedule.num_steps - 1, -1, -1, dtype=jnp.int32)
    x0, _ = jax.lax.scan(step, x_T.astype(jnp.float32), indices)
    return x0


def ancestral_step(
    schedule: Schedule,
    model_output: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    z: jax.Array,
    *,
    prediction: Prediction = "eps",
    sample_max_value: float | jax.Array = 1.5,
    threshold_ratio: float = 0.95,
) -> tuple[jax.Array, jax.Array]:
    """One step of equations (1) and (2): (x_{t−1}, thresholded x̂0), both (B, H, W, C) float32.

    model_output (B, H, W, 2C): what `prediction` names, then the variance channels; x_t and the noise z (B, H, W, C);
    t (B,) index into the schedule.
    """
    predicted, v = split_model_output(model_output.astype(jnp.float32))
    x0 = x0_from_prediction(schedule, prediction, x_t, t, predicted)
    x0 = dynamic_threshold(x0, threshold_ratio, sample_max_value)
    mean, _ = posterior(schedule, x0, x_t, t)
    sigma = jnp.exp(0.5 * learned_range_log_variance(schedule, v, t))
    # Chosen, not multiplied by [t > 0]: an overflowing σ must not reach the finished image as 0 · ∞.
    return mean + jnp.where((t > 0).reshape(-1, 1, 1, 1), sigma * z, 0.0), x0


def _normal(keys: jax.Array, data: int | jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """(B, *shape) standard normal, row b from keys[b] and `data` alone."""
    size = math.prod(shape)  # drawn flat: the same numbers, and they compile four times faster than images do
    flat = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, data), (size,), jnp.float32))(keys)
    return flat.reshape(-1, *shape)
