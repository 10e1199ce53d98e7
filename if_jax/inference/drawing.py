"""One stage as one compiled function: text states in, pictures out.

The whole reverse loop is a single program. What depends on the text alone (its projection, the pooled text, the keys
and values of every attention layer) does not change from step to step, and the compiler moves it out of the loop.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from if_jax.checkpoints.release import Stage, StageDefaults
from if_jax.checkpoints.scheduler import SchedulerConfig
from if_jax.diffusion import augment, guidance, samplers
from if_jax.diffusion.schedule import Schedule, cosine_schedule, parse_steps, respace
from if_jax.models.unet import UNet, UNetConfig

Params = Any

_STEP_WORDS = ("sample_timestep_respacing", "num_inference_steps", "timesteps")
_LEVEL_WORDS = ("aug_level", "noise_level")
_OTHER_WORDS = ("guidance_scale", "dynamic_thresholding_p", "dynamic_thresholding_c")


@dataclass(frozen=True)
class StageSettings:
    """How one stage draws, every choice made."""

    timesteps: tuple[int, ...]  # ascending
    guidance_scale: float
    noise_level: int | None  # super-resolution: 0…999, how much noise the low-resolution picture gets
    scheduler: SchedulerConfig


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


def stage_settings(name: str, stage: Stage, defaults: StageDefaults, given: dict[str, Any] | None) -> StageSettings:
    """Defaults overridden by IF's words or by those of diffusers.

    name: "I", "II", … for error messages. Steps: `sample_timestep_respacing` ("smart50", "10,10,5", "50"), or
    `num_inference_steps` (diffusers' evenly spaced list), or `timesteps` (a list). Noise level of a super-resolution
    stage: `aug_level` in [0, 1) or `noise_level` in steps, 0…999.
    Raises ValueError naming the word that is unknown, given twice or out of range.
    """
    given, where = dict(given or {}), f"if_{name}_kwargs"
    known = (*_STEP_WORDS, *_OTHER_WORDS, *(_LEVEL_WORDS if stage.kind == "super-resolution" else ()))
    for word in given:
        if word not in known:
            raise ValueError(
                f"{where} has no {word!r} (value {given[word]!r}): a {stage.kind} stage takes {', '.join(known)}"
            )
    for words in (_STEP_WORDS, _LEVEL_WORDS):
        if len(both := [word for word in words if word in given]) > 1:
            raise ValueError(f"{where} has both {both[0]} and {both[1]}, two words for one thing: give one")
    scheduler = replace(
        stage.scheduler,
        dynamic_thresholding_ratio=_number(
            where, given, "dynamic_thresholding_p", stage.scheduler.dynamic_thresholding_ratio
        ),
        sample_max_value=_number(where, given, "dynamic_thresholding_c", stage.scheduler.sample_max_value),
    )
    return StageSettings(
        timesteps=_timesteps(where, given, defaults, scheduler.num_train_timesteps),
        guidance_scale=_number(where, given, "guidance_scale", defaults.guidance_scale),
        noise_level=_noise_level(where, given, defaults, scheduler.num_train_timesteps),
        scheduler=scheduler,
    )


def draw_stage(
    stage: Stage,
    settings: StageSettings,
    keys: jax.Array,
    text: jax.Array,
    uncond: jax.Array,
    low_res: jax.Array | None = None,
    noise: StageNoise | None = None,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Draw B pictures (B, H, W, 3), float32 in about [-1, 1], not clamped.

    keys (B,): picture b depends on keys[b] alone, not on the batch. text, uncond (B, L, D). low_res (B, h, w, 3): what
    the previous stage drew. A guidance scale of 1 needs the conditional half only, and draws twice as fast.
    Compiles once per batch size, picture size and number of steps; scale, level and step list may vary freely.
    """
    guided = settings.guidance_scale != 1.0
    return _draw(
        stage.unet_params,
        respace(settings.scheduler.schedule(), settings.timesteps),
        keys,
        text,
        uncond if guided else None,
        np.float32(settings.guidance_scale),
        low_res,
        None if settings.noise_level is None else np.int32(settings.noise_level),
        None if noise is None else (noise.initial, noise.steps, noise.low_res),
        config=stage.unet_config,
        scheduler=settings.scheduler,
        dtype=jnp.dtype(dtype),
    )


def make_denoiser(
    params: Params,
    config: UNetConfig,
    shown: dict[str, jax.Array],
    uncond: jax.Array | None,
    weight: float | jax.Array,
    dtype: Any = jnp.float32,
) -> guidance.Denoiser:
    """The denoiser of a stage: (x_t (B, H, W, 3), t (B,)) -> (B, H, W, 6), guided unless `uncond` is None.

    shown: "text" (B, L, D) and, for super-resolution, the noised picture "low" (B, H, W, 3) and its "level" (B,).
    uncond (B, L, D): text states of the other half of the guided batch.
    """
    net = UNet(config, dtype=dtype)

    def apply(x_t: jax.Array, t: jax.Array, shown: dict[str, jax.Array]) -> jax.Array:
        x = jnp.concatenate([x_t, shown["low"]], axis=-1) if "low" in shown else x_t
        return net.apply({"params": params}, x, t, shown["text"], shown.get("level"))

    if uncond is None:
        return partial(apply, shown=shown)
    return guidance.guided(apply, shown, shown | {"text": uncond}, weight)


@partial(jax.jit, static_argnames=("config", "scheduler", "dtype"))
def _draw(
    params: Params,
    schedule: Schedule,
    keys: jax.Array,
    text: jax.Array,
    uncond: jax.Array | None,
    weight: jax.Array,
    low_res: jax.Array | None,
    level: jax.Array | None,
    noise: tuple | None,
    *,
    config: UNetConfig,
    scheduler: SchedulerConfig,
    dtype: Any,
) -> jax.Array:
    batch, size = text.shape[0], config.sample_size
    shape = (size, size, config.out_channels // 2)
    x_keys, low_keys = jax.vmap(jax.random.split, out_axes=1)(keys)  # (B,) each
    initial, steps, low_noise = noise or (samplers.initial_noise(x_keys, shape), None, None)
    shown = {"text": text}
    if low_res is not None:
        low_noise = samplers.initial_noise(low_keys, shape) if low_noise is None else low_noise
        shown["level"] = jnp.full((batch,), level)
        shown["low"] = augment.noise_augment(
            cosine_schedule(scheduler.num_train_timesteps), augment.upsample(low_res, size), shown["level"], low_noise
        )
    return samplers.ancestral(
        make_denoiser(params, config, shown, uncond, weight, dtype),
        schedule,
        initial,
        x_keys,
        prediction=scheduler.prediction,
        sample_max_value=scheduler.sample_max_value,
        threshold_ratio=scheduler.dynamic_thresholding_ratio,
        noise=steps,
    )


def _number(where: str, given: dict[str, Any], word: str, default: float) -> float:
    value = given.get(word, default)
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not np.isfinite(value):
        raise ValueError(f"{where}: {word} {value!r} is no number")
    return float(value)


def _timesteps(where: str, given: dict[str, Any], defaults: StageDefaults, total: int) -> tuple[int, ...]:
    word = next((word for word in _STEP_WORDS if word in given), None)
    spec = defaults.sample_timestep_respacing if word is None else given[word]
    try:
        if word == "num_inference_steps":
            if not 1 <= int(spec) <= total:
                raise ValueError(f"{spec!r} is not in 1…{total}")
            spec = [step * (total // int(spec)) for step in range(int(spec))]
        return tuple(int(step) for step in parse_steps(spec, total))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {word or 'default steps'} {spec!r}: {error}") from None


def _noise_level(where: str, given: dict[str, Any], defaults: StageDefaults, total: int) -> int | None:
    if defaults.noise_level is None:
        return None
    word = "aug_level" if "aug_level" in given else "noise_level"
    # IF truncates; the small term keeps 0.29 · 1000 = 289.99… from losing a step.
    scale = total if word == "aug_level" else 1
    level = int(_number(where, given, word, defaults.noise_level) * scale + 1e-6)
    if not 0 <= level < total or _number(where, given, word, 0) < 0:
        raise ValueError(
            f"{where}: {word} {given[word]!r} is out of range: aug_level is in [0, 1), noise_level in 0…{total - 1}"
        )
    return level
