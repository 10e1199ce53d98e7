"""One stage as one compiled function: text states in, pictures out.

The reverse loop of a stage is a single program, whatever is asked of it: prompts, keys, scales, thresholds, noise
level, strength and the steps themselves are arrays, the step list in tables of one length (`schedule.padded`). What it
compiles again for is a different shape (pictures per program, picture size) or a different computation: sampler,
guidance or none, an interval of guidance, projected guidance, a style prompt, a mask.

What depends on the text alone (its projection, the pooled text, the keys and values of every attention layer) does not
change from step to step, and the compiler moves it out of the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from if_jax.checkpoints.scheduler import SchedulerConfig
from if_jax.checkpoints.stages import StageRelease
from if_jax.diffusion import augment, guidance, samplers
from if_jax.diffusion.samplers import State
from if_jax.diffusion.schedule import Schedule, cosine_schedule, padded, respace
from if_jax.inference.settings import StageSettings
from if_jax.models.unet import UNet, UNetConfig

Params = Any
Conditioning = dict[
    str, jax.Array
]  # what a network is shown beside x_t and t: "text", and where needed "pooled", "low", "level"
StepCallback = Callable[[int, int, np.ndarray, np.ndarray], None]  # steps left, timestep, x_{t−1}, x̂0: (B, H, W, 3)
Progress = Callable[[int, int], None]  # steps done, of how many


@dataclass(frozen=True)
class StageNoise:
    """Noise given instead of drawn, to compare with another implementation; float32, B pictures, N steps."""

    initial: np.ndarray  # (B, H, W, 3)
    steps: np.ndarray  # (N, B, H, W, 3), row i is used at the i-th least noisy step, row 0 never
    low_res: np.ndarray | None = None  # (B, H, W, 3), super-resolution only

    def __getitem__(self, rows: np.ndarray) -> StageNoise:
        """The noise of some of the B pictures."""
        low_res = None if self.low_res is None else self.low_res[rows]
        return StageNoise(self.initial[rows], self.steps[:, rows], low_res)


def draw_stage(
    stage: StageRelease,
    settings: StageSettings,
    keys: jax.Array,
    text: jax.Array,
    uncond: jax.Array,
    low_res: jax.Array | None = None,
    noise: StageNoise | None = None,
    dtype: Any = jnp.float32,
    *,
    style: jax.Array | None = None,
    support: jax.Array | None = None,
    mask: jax.Array | None = None,
    size: tuple[int, int] | None = None,
    progress: Progress | None = None,
    callback: StepCallback | None = None,
) -> jax.Array:
    """Draw B pictures (B, H, W, 3), float32 in about [-1, 1], not clamped.

    keys (B,): picture b depends on keys[b] alone, not on the batch. text, uncond (B, L, D). low_res (B, h, w, 3): what
    the previous stage drew. A guidance scale of 1 needs the conditional half only, and draws twice as fast.
    style (B, L, D): text states of a style prompt, IF's third branch; it needs guidance.
    support (B, H, W, 3): picture to draw over, noised as `settings.strength` says. mask (B, H, W, 1): 1 where.
    size (H, W): of the pictures, unless it is the stage's own square or that of `support`.
    progress: told of steps done now and then. callback: given every step's x_{t−1} and x̂0; both cost a little.
    """
    state, advance = begin_stage(
        stage, settings, keys, text, uncond, low_res, noise, dtype, style=style, support=support, mask=mask, size=size
    )
    total = int(state.index) + 1
    for done, count in _chunks(total, 1 if callback else 10 if progress else 1_000):
        if progress is not None:
            progress(done, total)
        state = advance(state, count)
        if callback is not None:
            left = total - done - 1
            callback(left, settings.timesteps[left], np.asarray(state.x), np.asarray(state.x0))
        if progress is not None:
            state.x.block_until_ready()
            progress(done + count, total)
    return state.x


def begin_stage(
    stage: StageRelease,
    settings: StageSettings,
    keys: jax.Array,
    text: jax.Array,
    uncond: jax.Array,
    low_res: jax.Array | None = None,
    noise: StageNoise | None = None,
    dtype: Any = jnp.float32,
    *,
    style: jax.Array | None = None,
    support: jax.Array | None = None,
    mask: jax.Array | None = None,
    size: tuple[int, int] | None = None,
) -> tuple[State, Callable[[State, int], State]]:
    """Where a stage starts, and the compiled function that takes it so many steps on; arguments as in `draw_stage`."""
    total = settings.first_index + 1 if support is not None else len(settings.timesteps)
    side = stage.unet_config.sample_size
    height, width = np.shape(support)[1:3] if support is not None else size or (side, side)
    training = settings.scheduler.schedule()
    schedule = padded(respace(training, settings.timesteps))
    guided = settings.guided or style is not None
    state, low = _begin(
        schedule,
        keys,
        np.int32(total - 1),
        np.int32(total - 1 - settings.less_qsample_steps),
        support,
        mask,
        low_res,
        None if settings.noise_level is None else np.int32(settings.noise_level),
        None if noise is None else noise.initial,
        None if noise is None else noise.low_res,
        shape=(int(height), int(width), stage.unet_config.out_channels // 2),
    )
    program = partial(
        _advance,
        stage.unet_params,
        schedule,
        training,
        keys=keys,
        branches=_branches(text, uncond if guided else None, style if guided else None),
        low=low,
        scales=_scales(settings),
        mask=mask,
        noise=None if noise is None else jnp.asarray(noise.steps, jnp.float32),
        config=stage.unet_config,
        rules=_StaticOptions.of(settings, guided),
        dtype=jnp.dtype(dtype),
    )

    def advance(state: State, count: int) -> State:
        return program(state=state, counts=_counts(settings, int(state.index), count))

    return state, advance


def make_denoiser(
    params: Params,
    config: UNetConfig,
    branches: tuple[Conditioning, ...],
    combine: guidance.Combine | None = None,
    dtype: Any = jnp.float32,
) -> guidance.Denoiser:
    """The denoiser of a stage: (x_t (B, H, W, 3), t (B,)) -> (B, H, W, 6), guided where there are more branches.

    Each branch: "text" (B, L, D), where another text is pooled "pooled", and for super-resolution the noised picture
    "low" (B, H, W, 3) and its "level" (B,). First the conditional, last the unconditional one; see `guidance.guided`.
    """
    net = UNet(config, dtype=dtype)

    def apply(x_t: jax.Array, t: jax.Array, shown: Conditioning) -> jax.Array:
        x = jnp.concatenate([x_t, shown["low"]], axis=-1) if "low" in shown else x_t
        return net.apply({"params": params}, x, t, shown["text"], shown.get("level"), shown.get("pooled"))

    if len(branches) == 1:
        return partial(apply, shown=branches[0])
    return guidance.guided(apply, branches, combine)


@dataclass(frozen=True)
class _StaticOptions:
    """What of the settings changes the computation, and not only its numbers."""

    prediction: str
    sampler: str
    clipped_eps: bool
    interval: bool
    projected: bool

    @classmethod
    def of(cls, settings: StageSettings, guided: bool) -> _StaticOptions:
        return cls(
            settings.scheduler.prediction,
            settings.sampler,
            settings.clipped_eps and settings.sampler == "ddim",
            guided and settings.guidance_interval is not None,
            guided and settings.apg is not None,
        )


@partial(jax.jit, static_argnames=("shape",))
def _begin(
    schedule: Schedule,
    keys: jax.Array,
    index: jax.Array,
    noise_index: jax.Array,
    support: jax.Array | None,
    mask: jax.Array | None,
    low_res: jax.Array | None,
    level: jax.Array | None,
    x_noise: jax.Array | None,
    low_noise: jax.Array | None,
    *,
    shape: tuple[int, int, int],
) -> tuple[State, Conditioning]:
    """Where the loop starts, and what a super-resolution stage is shown of the low-resolution picture."""
    x_keys, low_keys = _stage_keys(keys)
    x = samplers.initial_noise(x_keys, shape) if x_noise is None else x_noise
    if support is not None:
        tables = jnp.asarray(schedule.sqrt_alpha_bar), jnp.asarray(schedule.sqrt_one_minus_alpha_bar)
        x = tables[0][noise_index] * support + tables[1][noise_index] * x
        x = x if mask is None else (1 - mask) * support + mask * x
    if low_res is None:
        return samplers.start(x, index), {}
    noise = samplers.initial_noise(low_keys, shape) if low_noise is None else low_noise
    levels = jnp.full((low_res.shape[0],), level)
    low = augment.noise_augment(cosine_schedule(), augment.upsample(low_res, shape[:2]), levels, noise)
    return samplers.start(x, index), {"low": low, "level": levels}


@partial(jax.jit, static_argnames=("config", "rules", "dtype"))
def _advance(
    params: Params,
    schedule: Schedule,
    training: Schedule,
    *,
    state: State,
    counts: jax.Array,
    keys: jax.Array,
    branches: tuple[Conditioning, ...],
    low: Conditioning,
    scales: Conditioning,
    mask: jax.Array | None,
    noise: jax.Array | None,
    config: UNetConfig,
    rules: _StaticOptions,
    dtype: Any,
) -> State:
    """Steps of the loop: counts (3,) without guidance, with it, and without again (see `_counts`)."""
    shape = state.x.shape[1:]
    noise_at = samplers.given_noise(noise) if noise is not None else _noise_of(keys, schedule, shape)
    how = {"mask": mask, "prediction": rules.prediction}
    how |= {"sample_max_value": scales["max_value"], "threshold_ratio": scales["ratio"]}
    branches = tuple(branch | low for branch in branches)

    def run_sampler(branches: tuple[Conditioning, ...], state: State, count: jax.Array) -> State:
        denoise = make_denoiser(params, config, branches, _combine(rules, scales, training), dtype)
        if rules.sampler == "ddim":
            ddim = partial(samplers.ddim, eta=scales["eta"], clipped_eps=rules.clipped_eps)
            return ddim(denoise, schedule, state, count, noise_at, **how)
        sampler = samplers.ddpm if rules.sampler == "ddpm" else samplers.dpm_solver_pp
        return sampler(denoise, schedule, state, count, noise_at, **how)

    if not rules.interval:
        return run_sampler(branches, state, counts.sum())

    def part(k: jax.Array, state: State) -> State:
        """One of the three parts; a branch that is not taken is not computed."""
        return jax.lax.cond(
            k == 1, partial(run_sampler, branches), partial(run_sampler, branches[:1]), state, counts[k]
        )

    return jax.lax.fori_loop(0, 3, part, state)


def _combine(rules: _StaticOptions, scales: Conditioning, training: Schedule) -> guidance.Combine:
    weight, mixer = scales["guidance"], scales["mixer"]
    if not rules.projected:
        return guidance.classifier_free(weight, mixer)
    parallel, norm = scales["apg"]
    return guidance.projected(weight, training, rules.prediction, parallel, norm, mixer)


def _branches(text: jax.Array, uncond: jax.Array | None, style: jax.Array | None) -> tuple[Conditioning, ...]:
    """The text of each branch. A style prompt is pooled in place of the prompt and has its own branch, as in IF."""
    if uncond is None:
        return ({"text": text},)
    if style is None:
        return ({"text": text}, {"text": uncond})
    return tuple({"text": seen, "pooled": pooled} for seen, pooled in ((text, style), (style, style), (uncond, uncond)))


def _scales(settings: StageSettings) -> dict[str, Any]:
    """The numbers of the settings, as arrays of one program."""
    scheduler: SchedulerConfig = settings.scheduler
    return {
        "guidance": np.float32(settings.guidance_scale),
        "mixer": np.float32(settings.positive_mixer),
        "apg": tuple(np.float32(value) for value in settings.apg or (0.0, np.inf)),
        "eta": np.float32(settings.eta),
        "max_value": np.float32(scheduler.sample_max_value),
        "ratio": np.float32(scheduler.dynamic_thresholding_ratio),
    }


def _counts(settings: StageSettings, index: int, count: int) -> np.ndarray:
    """(3,) int32: how many of `count` steps from `index` on lie above, in and below the interval of guidance."""
    if settings.guidance_interval is None:
        return np.array([0, count, 0], np.int32)
    low, high = settings.guidance_interval
    steps = np.array(settings.timesteps[index - count + 1 : index + 1])
    above, below = int((steps > high).sum()), int((steps < low).sum())
    return np.array([above, count - above - below, below], np.int32)


def _chunks(total: int, size: int) -> Iterator[tuple[int, int]]:
    """(steps done, steps to take) of each call of the program."""
    for done in range(0, total, size):
        yield done, min(size, total - done)


def _stage_keys(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two keys for each picture (B,): of x, and of the noise on its low-resolution picture."""
    x_keys, low_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    return x_keys, low_keys


def _noise_of(keys: jax.Array, schedule: Schedule, shape: tuple[int, int, int]) -> samplers.Noise:
    return samplers.keyed_noise(_stage_keys(keys)[0], schedule, shape)
