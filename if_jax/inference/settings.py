"""How a stage draws: IF's words and those of diffusers become one frozen dataclass, every choice made and checked.

Where IF's own code and diffusers differ, the default is what diffusers does, so that a release draws alike in both, and
IF's way has a word: `clipped_eps` (DDIM's ε̂ from the thresholded x̂0), `less_qsample_steps` (a style transfer that
starts less noised than its first step says), respacing strings in place of evenly spaced steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from if_jax.checkpoints.scheduler import SchedulerConfig
from if_jax.checkpoints.stages import StageDefaults, StageRelease
from if_jax.diffusion.samplers import SAMPLERS, SamplerName
from if_jax.diffusion.schedule import parse_steps

StageKwargs = Mapping[str, object]  # words of one stage, as a user writes them

_STEP_WORDS = ("sample_timestep_respacing", "num_inference_steps", "timesteps")
_LEVEL_WORDS = ("aug_level", "noise_level")
_LESS_WORDS = ("less_qsample_steps", "support_noise_less_qsample_steps")
SUPPORT_WORDS = ("strength", *_LESS_WORDS)  # of pictures that are drawn over
_OTHER_WORDS = (
    "guidance_scale",
    "dynamic_thresholding_p",
    "dynamic_thresholding_c",
    "positive_mixer",
    "sample_loop",
    "eta",
    "clipped_eps",
    "guidance_interval",
    "apg",
    "strength",
)
POSITIVE_MIXER = {"base": 0.25, "super-resolution": 0.5}  # IF's own


@dataclass(frozen=True)
class StageSettings:
    """How one stage draws, every choice made."""

    timesteps: tuple[int, ...]  # ascending
    guidance_scale: float
    noise_level: int | None  # super-resolution: 0…999, how much noise the low-resolution picture gets
    scheduler: SchedulerConfig
    sampler: SamplerName = "ddpm"
    eta: float = 0.0  # ddim: how much noise each step adds
    clipped_eps: bool = False  # ddim: ε̂ from the thresholded x̂0
    guidance_interval: tuple[int, int] | None = None  # timesteps, both included; None: guided everywhere
    apg: tuple[float, float] | None = None  # adaptive projected guidance: η, r; None: classifier-free
    positive_mixer: float = 0.25  # share of the style prompt
    strength: float = 1.0  # of a picture that is drawn over: the share of the steps that are taken
    less_qsample_steps: int = 0  # … and how many steps less than that it is noised

    @property
    def first_index(self) -> int:
        """Index of the first step for a picture that is drawn over."""
        return min(int(len(self.timesteps) * self.strength), len(self.timesteps)) - 1

    @property
    def guided(self) -> bool:
        """Whether any step needs the unconditional branch: a scale of 1 is the conditional one alone."""
        return self.guidance_scale != 1.0


def stage_settings(
    name: str, stage: StageRelease, defaults: StageDefaults, kwargs: StageKwargs | None, strength: float = 1.0
) -> StageSettings:
    """A stage's defaults overridden by IF's words or by those of diffusers.

    Args:
      name: "I", "II", … for error messages.
      stage: whose scheduler and kind decide what the words mean.
      defaults: of the stage.
      kwargs: the words, all optional. Steps: `sample_timestep_respacing` ("smart50", "10,10,5", "50", "ays10"), or
        `num_inference_steps` (diffusers' evenly spaced list), or `timesteps` (a list). `sample_loop`: ddpm, ddim
        (`eta`, `clipped_eps`) or dpm++. Noise level of a super-resolution stage: `aug_level` in [0, 1) or
        `noise_level` in steps, 0…999. Guidance: `guidance_scale`, `guidance_interval` (lowest and highest guided
        timestep), `apg` (True, or η and r), `positive_mixer` in [0, 1], `dynamic_thresholding_p` in (0, 1],
        `dynamic_thresholding_c` ≥ 1. Pictures drawn over: `strength` in (0, 1], `less_qsample_steps` (IF calls it
        support_noise_less_qsample_steps too).
      strength: the default one of the mode.

    Raises:
      ValueError: naming the word that is unknown, there twice or out of range.
    """
    kwargs, where = dict(kwargs or {}), f"if_{name}_kwargs"
    _check_words(where, stage.kind, kwargs)
    number = _Numbers(where, kwargs)
    scheduler = replace(
        stage.scheduler,
        dynamic_thresholding_ratio=number("dynamic_thresholding_p", stage.scheduler.dynamic_thresholding_ratio),
        sample_max_value=number("dynamic_thresholding_c", stage.scheduler.sample_max_value),
    )
    settings = StageSettings(
        timesteps=_timesteps(where, kwargs, defaults, scheduler),
        guidance_scale=number("guidance_scale", defaults.guidance_scale),
        noise_level=_noise_level(where, kwargs, defaults, scheduler.num_train_timesteps),
        scheduler=scheduler,
        sampler=_sampler(where, kwargs, scheduler.sampler),
        eta=number("eta", 0.0, 0.0, 1.0),
        clipped_eps=bool(kwargs.get("clipped_eps", False)),
        guidance_interval=_interval(where, kwargs),
        apg=_apg(where, kwargs),
        positive_mixer=number("positive_mixer", POSITIVE_MIXER[stage.kind], 0.0, 1.0),
        strength=number("strength", strength, 0.0, 1.0),
        less_qsample_steps=int(number(next((w for w in _LESS_WORDS if w in kwargs), _LESS_WORDS[0]), 0, 0)),
    )
    _check_start(where, settings)
    _check_effect(where, settings, kwargs)
    return settings


class _Numbers:
    """Reads numbers out of the words of one stage, checking each against its range."""

    def __init__(self, where: str, kwargs: StageKwargs) -> None:
        self.where, self.kwargs = where, kwargs

    def __call__(self, word: str, default: float, low: float = -math.inf, high: float = math.inf) -> float:
        value = self.kwargs.get(word, default)
        if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not np.isfinite(value):
            raise ValueError(f"{self.where}: {word} {value!r} is no finite number")
        if not low <= value <= high:
            raise ValueError(f"{self.where}: {word} {value!r} is out of range: use {low:g}…{high:g}")
        return float(value)


def _check_words(where: str, kind: str, kwargs: StageKwargs) -> None:
    levels = _LEVEL_WORDS if kind == "super-resolution" else ()
    known = (*_STEP_WORDS, *_OTHER_WORDS, *_LESS_WORDS, *levels)
    for word in kwargs:
        if word not in known:
            raise ValueError(
                f"{where} has no {word!r} (value {kwargs[word]!r}): a {kind} stage takes {', '.join(known)}"
            )
    for words in (_STEP_WORDS, _LEVEL_WORDS, _LESS_WORDS):
        if len(both := [word for word in words if word in kwargs]) > 1:
            raise ValueError(f"{where} has both {both[0]} and {both[1]}, two words for one thing: give one")


def _check_start(where: str, settings: StageSettings) -> None:
    count = len(settings.timesteps)
    if settings.first_index < 0:
        least = 1 / count
        raise ValueError(f"{where}: strength {settings.strength} of {count} steps is no step: use {least:.3g} or more")
    if settings.less_qsample_steps > settings.first_index:
        raise ValueError(
            f"{where}: less_qsample_steps {settings.less_qsample_steps} of {settings.first_index + 1} steps: use"
            f" 0…{settings.first_index}"
        )


def _check_effect(where: str, settings: StageSettings, kwargs: StageKwargs) -> None:
    """Refuses words that change nothing beside the others."""
    of_ddim = [word for word in ("eta", "clipped_eps") if kwargs.get(word)]
    if of_ddim and settings.sampler != "ddim":
        raise ValueError(
            f"{where}: {of_ddim[0]} {kwargs[of_ddim[0]]!r} does nothing with sample_loop {settings.sampler!r}: "
            "leave it out, or draw with ddim"
        )
    of_guidance = [word for word in ("guidance_interval", "apg") if kwargs.get(word)]
    if of_guidance and not settings.guided:
        raise ValueError(
            f"{where}: {of_guidance[0]} {kwargs[of_guidance[0]]!r} does nothing at guidance_scale 1: "
            "leave it out, or give another scale"
        )


def _sampler(where: str, kwargs: StageKwargs, default: str) -> SamplerName:
    value = kwargs.get("sample_loop", default)
    if value not in SAMPLERS:
        raise ValueError(f"{where}: sample_loop {value!r} is unknown: use one of {', '.join(SAMPLERS)}")
    return value


def _interval(where: str, kwargs: StageKwargs) -> tuple[int, int] | None:
    value = kwargs.get("guidance_interval")
    if value is None:
        return None
    try:
        low, high = (int(end) for end in cast(Iterable[int], value))
    except (TypeError, ValueError):
        low, high = 1, 0
    if not 0 <= low <= high:
        raise ValueError(f"{where}: guidance_interval {value!r}: give the lowest and the highest guided timestep")
    return low, high


def _apg(where: str, kwargs: StageKwargs) -> tuple[float, float] | None:
    value = kwargs.get("apg", False)
    if value is False or value is None:
        return None
    if value is True:
        return 0.0, math.inf
    try:
        parallel, norm = (float(part) for part in cast(Iterable[float], value))
    except (TypeError, ValueError):
        parallel = norm = math.nan
    if not (math.isfinite(parallel) and norm > 0):
        raise ValueError(f"{where}: apg {value!r}: give True, or η and r > 0")
    return parallel, norm


def _timesteps(where: str, kwargs: StageKwargs, defaults: StageDefaults, scheduler: SchedulerConfig) -> tuple[int, ...]:
    total = scheduler.num_train_timesteps
    word = next((word for word in _STEP_WORDS if word in kwargs), None)
    spec = defaults.sample_timestep_respacing if word is None else kwargs[word]
    try:
        steps = cast(str | Sequence[int], spec)
        if word == "num_inference_steps":
            count = int(cast(str, spec))
            if not 1 <= count <= total:
                raise ValueError(f"{spec!r} is not in 1…{total}")
            steps = scheduler.spread(count)
        return tuple(int(step) for step in parse_steps(steps, total))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {word or 'default steps'} {spec!r}: {error}") from None


def _noise_level(where: str, kwargs: StageKwargs, defaults: StageDefaults, total: int) -> int | None:
    if defaults.noise_level is None:
        return None
    word = "aug_level" if "aug_level" in kwargs else "noise_level"
    number = _Numbers(where, kwargs)
    # IF truncates; the small term keeps 0.29 · 1000 = 289.99… from losing a step.
    scale = total if word == "aug_level" else 1
    level = int(number(word, defaults.noise_level) * scale + 1e-6)
    if not 0 <= level < total or number(word, 0) < 0:
        raise ValueError(
            f"{where}: {word} {kwargs[word]!r} is out of range: aug_level is in [0, 1), noise_level in 0…{total - 1}"
        )
    if level > defaults.max_noise_level:
        raise ValueError(
            f"{where}: {word} {kwargs[word]!r} is more noise than this stage was trained with: use noise_level 0…"
            f"{defaults.max_noise_level}"
        )
    return level
