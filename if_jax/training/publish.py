"""From runs to a release: the EMA weights of each stage's newest checkpoint, joined into one cascade."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from if_jax.checkpoints import release, run
from if_jax.checkpoints.scheduler import PREDICTIONS, SchedulerConfig
from if_jax.config import Recipe, to_recipe
from if_jax.models import presets
from if_jax.text.tokens import load_tokenizer


def publish(
    runs: Sequence[str],
    cascade: str,
    *,
    dtype: str = "float32",
    steps: Sequence[str] = (),
    guidance: Sequence[float] = (),
    noise_level: Sequence[int] = (),
    overwrite: bool = False,
) -> None:
    """Writes the newest EMA weights of `runs` (stage I, II, …) as the release folder `cascade`.

    How a stage draws by default comes from its recipe's `sample` section; `steps`, `guidance` (one for each stage) and
    `noise_level` (one for each stage after the first) replace it.

    Raises:
      FileNotFoundError: a run without a finished checkpoint.
      ValueError: stages that do not belong together, or a folder that exists.
    """
    stages, defaults = [], []
    given = zip_longest(runs, steps[: len(runs)], guidance[: len(runs)], (None, *noise_level)[: len(runs)])
    for workdir, stage_steps, stage_guidance, stage_level in given:
        _, metadata, ema = run.read_ema(workdir)
        recipe = to_recipe(metadata["recipe"])
        stages.append(make_stage(recipe, ema, text_encoder_sha256=metadata["text_encoder_sha256"] or None))
        default = stage_defaults(recipe)
        defaults.append(
            release.StageDefaults(
                stage_steps or default.sample_timestep_respacing,
                default.guidance_scale if stage_guidance is None else stage_guidance,
                default.noise_level if stage_level is None else stage_level,
            )
        )
    release.write_cascade(cascade, stages, defaults, dtype=dtype, overwrite=overwrite)


def make_stage(
    recipe: Recipe, params: Any, *, size: int | None = None, text_encoder_sha256: str | None = None
) -> release.Stage:
    """What a recipe trains, as the stage that inference and release know; `size`: draw at another size."""
    unet = presets.UNETS[recipe.unet]
    unet = dataclasses.replace(unet, sample_size=size or unet.sample_size)
    scheduler = SchedulerConfig(recipe.sample_max_value, prediction_type=PREDICTIONS[recipe.prediction])
    stage = release.Stage(recipe.stage, unet, params["unet"], scheduler, text_encoder_sha256=text_encoder_sha256)
    if recipe.stage == "super-resolution":
        return stage
    text = presets.T5_ENCODERS[recipe.text_encoder]
    tokenizer = load_tokenizer("bytes")
    return dataclasses.replace(stage, text_config=text, text_params=params["text_encoder"], tokenizer=tokenizer)


def stage_defaults(recipe: Recipe) -> release.StageDefaults:
    """How a stage draws unless told otherwise: as its recipe samples."""
    level = recipe.sample.aug_level if recipe.stage == "super-resolution" else None
    return release.StageDefaults(recipe.sample.steps, recipe.sample.guidance_scale, level)
