"""Noise schedules: the arrays of one diffusion chain, and which of its steps a sampler visits.

A chain of N steps adds noise with variances β_0 … β_{N−1}; index 0 is the least noisy step:

    (1)  α_i = 1 − β_i                ᾱ_i = Π_{j≤i} α_j               ᾱ_{−1} = 1
    (2)  q(x_t | x0)       = N(√ᾱ_t x0, (1 − ᾱ_t) I)
    (3)  q(x_{t−1} | x_t, x0) = N(c_0 x0 + c_t x_t, β̃_t I)
         c_0 = √ᾱ_{t−1} β_t / (1 − ᾱ_t)    c_t = √α_t (1 − ᾱ_{t−1}) / (1 − ᾱ_t)    β̃_t = β_t (1 − ᾱ_{t−1}) / (1 − ᾱ_t)

A sampler may visit a subset of the steps. Its chain has the same ᾱ at the kept steps, and β follows from (1):

    (4)  β'_i = 1 − ᾱ_{s_i} / ᾱ_{s_{i−1}}

Sources: Ho et al. 2020 (arXiv:2006.11239), eqs. 4-7; Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 17 and section 4.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import jax
import numpy as np

Array = jax.Array | np.ndarray

STEP_LISTS: dict[str, str] = {  # steps per section of the training chain, from the clean end to the noisy end
    "fast27": "10,10,3,2,2",
    "smart27": "7,4,2,1,2,4,7",
    "smart50": "10,6,4,3,2,2,3,4,6,10",
    "smart100": "1,1,1,1,2,2,2,2,2,2,3,3,4,4,5,5,6,7,7,8,9,10,13",
    "smart185": "1,1,2,2,2,3,3,3,4,5,6,7,8,9,10,11,12,13,14,15,16,18,20",
    "super27": "1,1,1,1,1,1,1,2,5,13",
    "super40": "2,2,2,2,2,2,3,4,6,15",
    "super100": "4,4,6,6,8,8,10,10,14,30",
}


# Timesteps that are no sections. "ays10": the schedule of Align Your Steps (Sabour et al. 2024, arXiv:2404.14507) for
# IF's stage I with DPM-Solver++ (2M): its σ = 160.41, 8.081, 3.315, 1.885, 1.207, 0.785, 0.553, 0.293, 0.186 and
# 0.030, each at the timestep whose √(1 − ᾱ)/√ᾱ is nearest on a logarithmic scale; its last σ of 0.006 is ours of 0.
TIMESTEP_LISTS: dict[str, tuple[int, ...]] = {
    "ays10": (995, 920, 811, 686, 555, 418, 315, 174, 109, 12),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)  # tables have no single truth value; schedules compare by identity
class Schedule:
    """One chain as tables of shape (N,), float32, index 0 = least noisy.

    It is a pytree, so a jitted function takes it as an argument: another step list of equal length does not recompile.
    The tables are numpy arrays made in float64, because 1 − ᾱ in float32 has no accurate digits left near index 0.
    """

    timesteps: Array  # (N,) int32: the t the network sees, out of the training chain
    beta: Array
    log_beta: Array
    alpha_bar: Array
    alpha_bar_prev: Array
    one_minus_alpha_bar_prev: Array
    sqrt_alpha_bar: Array
    sqrt_one_minus_alpha_bar: Array
    posterior_variance: Array  # β̃; 0 at index 0
    posterior_log_variance: Array  # ln β̃; index 0 repeats index 1, since ln 0 has no use
    posterior_coef_x0: Array
    posterior_coef_xt: Array

    @property
    def num_steps(self) -> int:
        """N, the number of steps of this chain."""
        return self.timesteps.shape[0]


def cosine_betas(num_timesteps: int = 1000, max_beta: float = 0.999, size: int = 64) -> np.ndarray:
    """β of the cosine schedule: ᾱ follows cos²((u + 0.008)/1.008 · π/2), u in [0, 1].

    Source: Nichol & Dhariwal 2021, eq. 17, named `squaredcos_cap_v2` in scheduler configurations; the shift is eq. 4 of
    Hoogeboom et al. 2023 (arXiv:2301.11093).

    Args:
      num_timesteps: N.
      max_beta: ceiling of β.
      size: shifts the schedule for pictures of that side, so that their 64 px averages are as noisy at each step as
        pictures of 64 px are: ln SNR falls by 2 ln(size / 64), since averaging (size / 64)² pixels removes that
        much noise.

    Returns:
      (N,) float64.
    """
    u = np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps
    f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    if size != 64:
        alpha_bar, scale = f / f[0], (64 / size) ** 2
        f = scale * alpha_bar / (1 - alpha_bar + scale * alpha_bar)
    return np.minimum(1 - f[1:] / f[:-1], max_beta)


def cosine_schedule(num_timesteps: int = 1000) -> Schedule:
    """The schedule every published IF stage was trained with (and the one that noises low-res images)."""
    return schedule_from_betas(cosine_betas(num_timesteps))


def schedule_from_betas(betas: Sequence[float] | np.ndarray) -> Schedule:
    """The chain of a list of β.

    α = 1 − β is rounded to float32 and only then multiplied up in float64: schedulers that read a release from its
    configuration do the same, and so share ᾱ with us to the last bit.

    Args:
      betas: (N,), each in (0, 1), N ≥ 2.

    Raises:
      ValueError: for anything else.
    """
    betas = np.asarray(betas, np.float32)
    if betas.ndim != 1 or betas.size < 2 or not np.all((betas > 0) & (betas < 1)):
        raise ValueError(f"betas must be a list of at least 2 numbers inside (0, 1), got {_brief(betas)}")
    alpha = np.float32(1) - betas
    return _chain(np.arange(betas.size), np.cumprod(alpha.astype(np.float64)))


def parse_steps(spec: str | int | Sequence[int] | np.ndarray, num_timesteps: int = 1000) -> np.ndarray:
    """The timesteps that a step specification selects.

    Args:
      spec: a name out of STEP_LISTS ("smart50") or TIMESTEP_LISTS ("ays10"), a number of evenly spread steps (50 or
        "50"), steps per section ("10,10,3,2,2": equal sections of the chain, from the clean end; 0 skips a
        section), an integer stride that gives exactly that many steps ("ddim25"), the noisy ends of that many equal
        parts ("trailing4": what diffusers calls so), or timesteps in any order.
      num_timesteps: of the training chain.

    Returns:
      Ascending int32, a subset of 0 … num_timesteps − 1.

    Raises:
      ValueError: where the specification selects nothing or something outside the chain.
    """
    if isinstance(spec, int | np.integer) and not isinstance(spec, bool):
        spec = str(int(spec))
    if not isinstance(spec, str):
        return _explicit_steps(np.asarray(spec), num_timesteps)
    if spec.strip() in TIMESTEP_LISTS:
        return _explicit_steps(TIMESTEP_LISTS[spec.strip()], num_timesteps)
    text = STEP_LISTS.get(spec.strip(), spec.strip())
    if match := re.fullmatch(r"ddim(\d+)", text):
        return _strided_steps(int(match[1]), num_timesteps)
    if match := re.fullmatch(r"trailing(\d+)", text):
        return _explicit_steps(trailing_steps(int(match[1]), num_timesteps), num_timesteps)
    if not re.fullmatch(r"\d+(\s*,\s*\d+)*", text):
        named = ", ".join([*STEP_LISTS, *TIMESTEP_LISTS])
        raise ValueError(f"unknown steps {spec!r}: use one of {named}, '50', '10,10,5', 'ddim25' or 'trailing4'")
    return _section_steps([int(count) for count in text.split(",")], num_timesteps)


def trailing_steps(count: int, num_timesteps: int = 1000) -> list[int]:
    """The noisy ends of `count` equal parts of the chain, noisiest first, as diffusers' schedulers round them.

    Raises:
      ValueError: for a count that is not in 1 … num_timesteps.
    """
    if not 1 <= count <= num_timesteps:
        raise ValueError(f"'trailing{count}': use 1 … {num_timesteps} steps")
    return (np.round(np.arange(num_timesteps, 0, -num_timesteps / count)).astype(int) - 1).tolist()


def respace(schedule: Schedule, timesteps: Sequence[int] | np.ndarray) -> Schedule:
    """The shorter chain that visits only some timesteps of a training chain, equation (4).

    Args:
      schedule: the training chain.
      timesteps: those it visits, in any order.

    Raises:
      ValueError: if the schedule is respaced already: its tables no longer hold the steps in between.
    """
    if not np.array_equal(schedule.timesteps, np.arange(schedule.num_steps)):
        raise ValueError(
            f"cannot respace a chain of {schedule.num_steps} chosen steps again: respace the training schedule"
        )
    steps = _explicit_steps(timesteps, schedule.num_steps)
    alpha_bar = np.cumprod(1 - np.asarray(schedule.beta, np.float64))  # float64 again: `beta` holds 1 − α exactly
    return _chain(steps, alpha_bar[steps])


def padded(schedule: Schedule, length: int = 1000) -> Schedule:
    """The chain with its tables filled up to `length`: chains of any number of steps are then one shape to a compiler.

    The noisiest step is repeated, and no sampler visits the repetitions.

    Raises:
      ValueError: for a longer chain.
    """
    fill = length - schedule.num_steps
    if fill < 0:
        raise ValueError(f"a chain of {schedule.num_steps} steps does not fit tables of {length}")
    return jax.tree.map(lambda table: np.pad(table, (0, fill), mode="edge"), schedule)


def _chain(timesteps: np.ndarray, alpha_bar: np.ndarray) -> Schedule:
    """All tables from ᾱ (N,) float64."""
    prev = np.append(1.0, alpha_bar[:-1])
    alpha = alpha_bar / prev
    beta = 1 - alpha
    variance = beta * (1 - prev) / (1 - alpha_bar)
    # A chain of one step has no index 1 to repeat; its only step draws no noise, so any finite value will do.
    log_variance = np.log(np.append(variance[1:2] if variance.size > 1 else beta, variance[1:]))
    tables = dict(
        beta=beta,
        log_beta=np.log(beta),
        alpha_bar=alpha_bar,
        alpha_bar_prev=prev,
        one_minus_alpha_bar_prev=1 - prev,
        sqrt_alpha_bar=np.sqrt(alpha_bar),
        sqrt_one_minus_alpha_bar=np.sqrt(1 - alpha_bar),
        posterior_variance=variance,
        posterior_log_variance=log_variance,
        posterior_coef_x0=np.sqrt(prev) * beta / (1 - alpha_bar),
        posterior_coef_xt=np.sqrt(alpha) * (1 - prev) / (1 - alpha_bar),
    )
    return Schedule(
        timesteps=np.asarray(timesteps, np.int32),
        **{name: table.astype(np.float32) for name, table in tables.items()},
    )


def _section_steps(counts: list[int], num_timesteps: int) -> np.ndarray:
    """`counts[k]` evenly spread steps, both ends included, in section k of len(counts) equal sections."""
    size, extra = divmod(num_timesteps, len(counts))
    steps: list[np.ndarray] = []
    start = 0
    for k, count in enumerate(counts):
        length = size + (k < extra)  # the first sections take the remainder
        if count > length:
            raise ValueError(
                f"section {k} of the steps {','.join(map(str, counts))} has {length} timesteps,"
                f" {count} asked: use at most {length}"
            )
        stride = (length - 1) / (count - 1) if count > 1 else 0.0
        # A running sum rounded half to even, as the published lists were made: j · stride can round differently.
        offsets = np.cumsum(np.append(0.0, np.full(max(count - 1, 0), stride)))[:count]
        steps.append(start + np.rint(offsets).astype(np.int32))
        start += length
    return _explicit_steps(np.concatenate(steps), num_timesteps)


def _strided_steps(count: int, num_timesteps: int) -> np.ndarray:
    """0, k, 2k, … for the smallest integer stride k that gives exactly `count` steps."""
    for stride in range(1, num_timesteps + 1):
        steps = np.arange(0, num_timesteps, stride, dtype=np.int32)
        if steps.size == count:
            return steps
    raise ValueError(f"'ddim{count}': no integer stride gives {count} of {num_timesteps} steps, use '{count}' instead")


def _explicit_steps(timesteps: Sequence[int] | np.ndarray, num_timesteps: int) -> np.ndarray:
    steps = np.asarray(timesteps)
    if steps.ndim != 1 or steps.size == 0 or not np.issubdtype(steps.dtype, np.integer):
        raise ValueError(f"steps must be a non-empty list of whole numbers, got {_brief(steps)}")
    if steps.min() < 0 or steps.max() >= num_timesteps:
        raise ValueError(f"steps must lie in 0 … {num_timesteps - 1}, got {steps.min()} … {steps.max()}")
    unique = np.unique(steps).astype(np.int32)
    if unique.size != steps.size:
        raise ValueError(f"steps must differ from one another, got {steps.size - unique.size} repeated")
    return unique


def _brief(values: np.ndarray) -> str:
    """Values in an error message, on one line however many there are."""
    return " ".join(np.array2string(values, threshold=6, edgeitems=2).split())
