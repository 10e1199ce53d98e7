"""Teaching a net to draw in few steps: where its teacher's deterministic jumps lead, and what it should have said.

    (1)  x_s = √ᾱ_s x0 + √(1 − ᾱ_s) ε̂,   ε̂ = (x_t − √ᾱ_t x0) / √(1 − ᾱ_t)     the jump from t to s that believes x0
    (2)  x0* = (x_s − r x_t) / (√ᾱ_s − r √ᾱ_t),   r = √(1 − ᾱ_s) / √(1 − ᾱ_t)     the x0 whose jump lands on x_s
    (3)  L   = (1 + min(SNR_t, 5)) ‖x̂0 − x0*‖² / D

(1) is DDIM without noise, its ε̂ of the x0 that it believes. The student draws in N jumps, which cut the chain into N
segments of equal length; at the end of the last, s = −1, stands the clean picture (ᾱ = 1). What a student at t should
land on, at the end s of its segment:

    progressive   t is the beginning of a segment; K jumps of the teacher lead to s
    consistency   t is any of K points of a segment; one jump of the teacher leads to the next point, and one of the
                  student, not differentiated, from there to s: so all points of a segment come to say the same

(3) is the squared error of v, which stays sound where x_t is almost noise and where it is almost clean, but for the cap
of min-SNR on the second.

Sources: Song et al. 2020 (arXiv:2010.02502), eq. 12; Salimans & Ho 2022 (arXiv:2202.00512), section 3, appendices D
and G, for (2) and (3); Meng et al. 2023 (arXiv:2210.03142), section 3, for guided teachers; Heek et al. 2024
(arXiv:2403.06807), section 3.1, for consistency by segments; Hang et al. 2023 (arXiv:2303.09556) for the cap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from if_jax.diffusion.schedule import Array, Schedule

DistillMethod = Literal["progressive", "consistency"]
METHODS: tuple[DistillMethod, ...] = get_args(DistillMethod)
Believe = Callable[[jax.Array, jax.Array], jax.Array]  # (x_t (B, H, W, C), t (B,)) -> x̂0 (B, H, W, C)
_SNR_CAP = 5.0


def jump(schedule: Schedule, x_t: Array, t: Array, s: Array, x0: Array) -> jax.Array:
    """x_s of equation (1).

    Args:
      schedule: the training chain.
      x_t: (B, H, W, C).
      t: (B,) int, where the jump begins.
      s: (B,) int, where it ends: less noisy than t, −1 for the clean picture.
      x0: (B, H, W, C), what is believed at t.
    """
    (a_t, o_t), (a_s, o_s) = _signal_and_noise(schedule, t), _signal_and_noise(schedule, s)
    return a_s * x0 + o_s * (jnp.asarray(x_t) - a_t * x0) / o_t


def belief_of_jump(schedule: Schedule, x_t: Array, t: Array, s: Array, x_s: Array) -> jax.Array:
    """x0* of equation (2): what must be believed at t for the jump to s to land on x_s; arguments as for `jump`."""
    (a_t, o_t), (a_s, o_s) = _signal_and_noise(schedule, t), _signal_and_noise(schedule, s)
    r = o_s / o_t
    return (jnp.asarray(x_s) - r * x_t) / (a_s - r * a_t)


def segment_end(schedule: Schedule, t: Array, steps: int) -> jax.Array:
    """Where a jump of the student from t (B,) ends: the clean end of the segment that t lies in."""
    length = schedule.num_steps // steps
    return jnp.asarray(t) // length * length - 1


def target(
    method: DistillMethod,
    schedule: Schedule,
    teacher: Believe,
    student: Believe,
    x_t: Array,
    t: Array,
    steps: int,
    substeps: int,
) -> jax.Array:
    """What the student should believe at t, x0* of equation (2).

    Args:
      method: "progressive" or "consistency".
      schedule: the training chain.
      teacher: what the teacher believes; bounded, as it draws.
      student: what the student believes, for consistency.
      x_t: (B, H, W, C).
      t: (B,) int, of `student_timesteps`.
      steps: N, jumps in which the student draws.
      substeps: K, jumps of the teacher for each.

    Returns:
      (B, H, W, C); nothing is differentiated through it.
    """
    small, end = schedule.num_steps // (steps * substeps), segment_end(schedule, t, steps)
    x_t = jax.lax.stop_gradient(jnp.asarray(x_t))

    def teach(x: jax.Array, at: jax.Array) -> jax.Array:
        return jump(schedule, x, at, at - small, teacher(x, at))

    if method == "progressive":
        body = lambda k, x: teach(x, t - k * small)  # noqa: E731
        landed = jax.lax.fori_loop(0, substeps, body, x_t)
    else:
        after = teach(x_t, jnp.asarray(t))
        inside = jnp.maximum(t - small, 0)  # −1 asks no net; its row is not used
        finished = jump(schedule, after, inside, end, student(after, inside))
        landed = jnp.where(_column(jnp.asarray(t - small > end)), finished, after)
    return jax.lax.stop_gradient(belief_of_jump(schedule, x_t, t, end, landed))


def distillation_loss(schedule: Schedule, believed: Array, wanted: Array, t: Array) -> dict[str, jax.Array]:
    """The loss of each picture, equation (3).

    Args:
      schedule: the training chain.
      believed: (B, H, W, C), x̂0 of the student at t.
      wanted: (B, H, W, C), of `target`.
      t: (B,) int.

    Returns:
      {"loss", "mse": that of x0 without its weight}, each (B,) float32.
    """
    mse = jnp.mean((jnp.asarray(believed) - wanted) ** 2, axis=(1, 2, 3))
    alpha_bar = jnp.asarray(schedule.alpha_bar)[t]
    snr = alpha_bar / jnp.asarray(schedule.sqrt_one_minus_alpha_bar)[t] ** 2
    return {"loss": (1 + jnp.minimum(snr, _SNR_CAP)) * mse, "mse": mse}


def student_timesteps(method: DistillMethod, steps: int, substeps: int, num_timesteps: int = 1000) -> range:
    """The timesteps a student is trained at, ascending: those it draws at and, for consistency, those between.

    Args:
      method: see `target`.
      steps: N.
      substeps: K.
      num_timesteps: of the training chain.

    Raises:
      ValueError: the chain does not divide into N · K equal parts.
    """
    if num_timesteps % (steps * substeps):
        raise ValueError(f"{steps} × {substeps} jumps do not divide a chain of {num_timesteps}")
    length = num_timesteps // (steps if method == "progressive" else steps * substeps)
    return range(length - 1, num_timesteps, length)


def _signal_and_noise(schedule: Schedule, t: Array) -> tuple[jax.Array, jax.Array]:
    """√ᾱ_t and √(1 − ᾱ_t), each (B, 1, 1, 1): 1 and 0 at −1."""
    clean, at = jnp.asarray(t) < 0, jnp.maximum(t, 0)
    signal = jnp.where(clean, 1.0, jnp.asarray(schedule.sqrt_alpha_bar)[at])
    noise = jnp.where(clean, 0.0, jnp.asarray(schedule.sqrt_one_minus_alpha_bar)[at])
    return _column(signal), _column(noise)


def _column(values: jax.Array) -> jax.Array:
    return values.reshape(-1, 1, 1, 1)
