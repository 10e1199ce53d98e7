"""One stage as one compiled function: text states in, pictures out.

The reverse loop of a stage is a single program, whatever is asked of it: prompts, keys, scales, thresholds, noise
level, strength and the steps themselves are arrays, the step list in tables of one length (`schedule.padded`). What it
compiles again for is a different shape (pictures per program, picture size) or a different computation: sampler,
guidance or none, an interval of guidance, projected guidance, a style prompt, a mask.

What depends on the text alone (its projection, the pooled text, the keys and values of every attention layer) does not
change from step to step, and the compiler moves it out of the loop.

    pictures = finish_stage(*begin_stage(stage, settings, keys, StageInputs(text, uncond)))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from if_jax.checkpoints.stages import StageRelease
from if_jax.checkpoints.weights import Params
from if_jax.diffusion import augment, guidance, samplers
from if_jax.diffusion.process import Prediction
from if_jax.diffusion.samplers import SamplerName, SamplerState
from if_jax.diffusion.schedule import Array, Schedule, cosine_schedule, padded, respace
from if_jax.inference.settings import StageSettings
from if_jax.inference.stage_inputs import StageInputs
from if_jax.models.unet import UNet, UNetConfig

Advance = Callable[[SamplerState, int], SamplerState]  # a stage's state → the same, so many steps on
StepCallback = Callable[[int, SamplerState], None]  # steps left, the state after a step
StepProgress = Callable[[int, int], None]  # steps done, of how many


class LowRes(NamedTuple):
    """What a super-resolution network sees of the low-resolution picture."""

    image: jax.Array  # (B, H, W, 3), enlarged and noised
    level: Array  # (B,) int, how much: a timestep of the cosine chain


class Conditioning(NamedTuple):
    """What a network is given beside x_t and t."""

    text: Array  # (B, L, D)
    low: LowRes | None = None  # super-resolution only
    pooled: Array | None = None  # (B, L, D), where another text than `text` is pooled into the step embedding


def begin_stage(
    stage: StageRelease,
    settings: StageSettings,
    keys: jax.Array,
    inputs: StageInputs,
    *,
    size: tuple[int, int] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> tuple[SamplerState, Advance]:
    """Where a stage starts, and the compiled function that takes it so many steps on.

    Args:
      stage: with its UNet's parameters on the device.
      settings: how it draws. A guidance scale of 1 needs the conditional half only, and draws twice as fast.
      keys: (B,); picture b depends on keys[b] alone, not on the batch.
      inputs: of B pictures.
      size: (H, W) of the pictures, unless it is the stage's own square or that of `inputs.support`.
      dtype: of matrix products and convolutions.
    """
    support = inputs.support
    total = settings.first_index + 1 if support is not None else len(settings.timesteps)
    side = stage.unet_config.sample_size
    height, width = np.shape(support)[1:3] if support is not None else size or (side, side)
    training = settings.scheduler.schedule()
    schedule = padded(respace(training, settings.timesteps))
    state, low = _begin(
        schedule,
        keys,
        np.int32(total - 1),
        np.int32(total - 1 - settings.less_qsample_steps),
        np.int32(settings.noise_level or 0),
        inputs,
        shape=(int(height), int(width), stage.unet_config.out_channels // 2),
    )
    program = partial(
        _advance,
        stage.unet_params,
        schedule,
        training,
        keys=keys,
        inputs=inputs,
        low=low,
        scales=_Scales.of(settings),
        config=stage.unet_config,
        options=_StaticOptions.of(settings, styled=inputs.style is not None),
        dtype=jnp.dtype(dtype),
    )

    def advance(state: SamplerState, count: int) -> SamplerState:
        return program(state=state, counts=_counts(settings, int(state.index), count))

    return state, advance


def finish_stage(
    state: SamplerState, advance: Advance, progress: StepProgress | None = None, callback: StepCallback | None = None
) -> jax.Array:
    """Take all steps that are left.

    Args:
      state: where the stage stands.
      advance: of `begin_stage`.
      progress: called with steps done and their total, now and then.
      callback: called after every step with how many are left and the state. Both calls cost a little.

    Returns:
      Pictures (B, H, W, 3), float32 in about [-1, 1], not clamped.
    """
    total = int(state.index) + 1
    chunk = 1 if callback else 10 if progress else 1_000
    if progress is not None:
        progress(0, total)
    for done in range(0, total, chunk):
        count = min(chunk, total - done)
        state = advance(state, count)
        if callback is not None:
            callback(total - done - 1, state)
        if progress is not None:
            state.x.block_until_ready()
            progress(done + count, total)
    return state.x


def make_denoiser(
    params: Params,
    config: UNetConfig,
    branches: tuple[Conditioning, ...],
    combine: guidance.Combine,
    dtype: DTypeLike = jnp.float32,
) -> guidance.Denoiser:
    """The denoiser of a stage: (x_t (B, H, W, 3), t (B,)) → (B, H, W, 6).

    Args:
      params: of the UNet.
      config: of the UNet.
      branches: first the conditional, last the unconditional one; a single one is not guided.
      combine: how the branches become one prediction, see `guidance.guided`.
      dtype: of matrix products and convolutions.
    """
    net = UNet(config, dtype=jnp.dtype(dtype))

    def apply(x_t: jax.Array, t: jax.Array, cond: Conditioning) -> jax.Array:
        x, level = (x_t, None) if cond.low is None else (jnp.concatenate([x_t, cond.low.image], -1), cond.low.level)
        return cast(jax.Array, net.apply({"params": params}, x, t, cond.text, level, cond.pooled))

    if len(branches) == 1:
        return partial(apply, cond=branches[0])
    return guidance.guided(apply, branches, combine)


class _Scales(NamedTuple):
    """The numbers of the settings, scalar arrays to the compiled program."""

    guidance: Array
    mixer: Array
    apg_parallel: Array
    apg_norm: Array
    eta: Array
    max_value: Array
    ratio: Array

    @classmethod
    def of(cls, settings: StageSettings) -> _Scales:
        scheduler = settings.scheduler
        values = (
            settings.guidance_scale,
            settings.positive_mixer,
            *(settings.apg or (0.0, np.inf)),
            settings.eta,
            scheduler.sample_max_value,
            scheduler.dynamic_thresholding_ratio,
        )
        return cls(*(np.asarray(value, np.float32) for value in values))


@dataclass(frozen=True)
class _StaticOptions:
    """What of the settings changes the computation, and not only its numbers."""

    prediction: Prediction
    sampler: SamplerName
    clipped_eps: bool
    guided: bool
    interval: bool
    projected: bool
    fixed_variance: bool

    @classmethod
    def of(cls, settings: StageSettings, styled: bool) -> _StaticOptions:
        guided = settings.guided or styled
        return cls(
            settings.scheduler.prediction,
            settings.sampler,
            settings.clipped_eps and settings.sampler == "ddim",
            guided,
            guided and settings.guidance_interval is not None,
            guided and settings.apg is not None,
            settings.scheduler.variance_type == "fixed_small",
        )


@partial(jax.jit, static_argnames=("shape",))
def _begin(
    schedule: Schedule,
    keys: jax.Array,
    index: jax.Array,
    noise_index: jax.Array,
    level: jax.Array,
    inputs: StageInputs,
    *,
    shape: tuple[int, int, int],
) -> tuple[SamplerState, LowRes | None]:
    """Where the loop starts, and what a super-resolution stage sees of the low-resolution picture."""
    x_keys, low_keys = _stage_keys(keys)
    noise, support, mask = inputs.noise, inputs.support, inputs.mask
    x = samplers.initial_noise(x_keys, shape) if noise is None else noise.initial
    if support is not None:
        tables = jnp.asarray(schedule.sqrt_alpha_bar), jnp.asarray(schedule.sqrt_one_minus_alpha_bar)
        x = tables[0][noise_index] * support + tables[1][noise_index] * x
        x = x if mask is None else (1 - mask) * support + mask * x
    state = samplers.start(x, index)
    if inputs.low_res is None:
        return state, None
    eps = samplers.initial_noise(low_keys, shape) if noise is None or noise.low_res is None else noise.low_res
    levels = jnp.full((inputs.low_res.shape[0],), level)
    return state, noised_low_res(inputs.low_res, levels, eps, shape[:2])


def noised_low_res(low_res: Array, level: Array, eps: Array, size: int | tuple[int, int]) -> LowRes:
    """Low-resolution pictures (B, h, w, 3) enlarged to `size` and noised to level (B,) by eps (B, H, W, 3)."""
    return LowRes(augment.noise_augment(cosine_schedule(), augment.upsample(low_res, size), level, eps), level)


@partial(jax.jit, static_argnames=("config", "options", "dtype"))
def _advance(
    params: Params,
    schedule: Schedule,
    training: Schedule,
    *,
    state: SamplerState,
    counts: jax.Array,
    keys: jax.Array,
    inputs: StageInputs,
    low: LowRes | None,
    scales: _Scales,
    config: UNetConfig,
    options: _StaticOptions,
    dtype: DTypeLike,
) -> SamplerState:
    """Steps of the loop: counts (3,) without guidance, with it, and without again (see `_counts`)."""
    if inputs.noise is None:
        noise = samplers.keyed_noise(_stage_keys(keys)[0], schedule, state.x.shape[1:])
    else:
        noise = samplers.array_noise(inputs.noise.steps)
    branches, combine = _branches(inputs, low, options.guided), _combine(options, scales, training)

    def run_sampler(branches: tuple[Conditioning, ...], state: SamplerState, count: jax.Array) -> SamplerState:
        denoise = make_denoiser(params, config, branches, combine, dtype)
        return samplers.run_sampler(
            samplers.make_update(options.sampler, scales.eta, options.clipped_eps),
            guidance.with_fixed_variance(denoise) if options.fixed_variance else denoise,
            schedule,
            state,
            count,
            noise,
            mask=inputs.mask,
            prediction=options.prediction,
            sample_max_value=scales.max_value,
            threshold_ratio=scales.ratio,
        )

    if not options.interval:
        return run_sampler(branches, state, counts.sum())

    def part(k: jax.Array, state: SamplerState) -> SamplerState:
        """One of the three parts; a branch that is not taken is not computed."""
        return jax.lax.cond(
            k == 1, partial(run_sampler, branches), partial(run_sampler, branches[:1]), state, counts[k]
        )

    return jax.lax.fori_loop(0, 3, part, state)


def _combine(options: _StaticOptions, scales: _Scales, training: Schedule) -> guidance.Combine:
    if not options.projected:
        return guidance.classifier_free(scales.guidance, scales.mixer)
    parallel, norm = scales.apg_parallel, scales.apg_norm
    return guidance.projected(scales.guidance, training, options.prediction, parallel, norm, scales.mixer)


def _branches(inputs: StageInputs, low: LowRes | None, guided: bool) -> tuple[Conditioning, ...]:
    """The branches of guidance. A style prompt is pooled in place of the prompt and has its own branch, as in IF."""
    text, uncond, style = inputs.text, inputs.uncond, inputs.style
    if not guided:
        return (Conditioning(text, low),)
    if style is None:
        return Conditioning(text, low), Conditioning(uncond, low)
    return Conditioning(text, low, style), Conditioning(style, low, style), Conditioning(uncond, low, uncond)


def _counts(settings: StageSettings, index: int, count: int) -> np.ndarray:
    """(3,) int32: how many of `count` steps from `index` on lie above, in and below the interval of guidance."""
    if settings.guidance_interval is None:
        return np.array([0, count, 0], np.int32)
    low, high = settings.guidance_interval
    steps = np.array(settings.timesteps[index - count + 1 : index + 1])
    above, below = int((steps > high).sum()), int((steps < low).sum())
    return np.array([above, count - above - below, below], np.int32)


def _stage_keys(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two keys for each picture (B,): of x, and of the noise on its low-resolution picture."""
    x_keys, low_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    return x_keys, low_keys
