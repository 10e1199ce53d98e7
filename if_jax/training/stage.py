"""What a recipe trains, as inference and releases know it."""

from __future__ import annotations

import dataclasses

from if_jax.checkpoints.scheduler import PREDICTIONS, SchedulerConfig
from if_jax.checkpoints.stages import StageDefaults, StageRelease
from if_jax.checkpoints.weights import Params
from if_jax.config import Recipe
from if_jax.diffusion.schedule import cosine_betas
from if_jax.models import presets


def make_stage(recipe: Recipe, unet_params: Params, *, size: int | None = None) -> StageRelease:
    """The stage that a recipe trains, without its text encoder.

    Args:
      recipe: what is trained.
      unet_params: parameters of its UNet.
      size: side of the pictures to draw; None: the stage's own.
    """
    unet = presets.UNETS[recipe.unet]
    unet = dataclasses.replace(unet, sample_size=size or unet.sample_size)
    betas = None if recipe.noise_size == 64 else tuple(map(float, cosine_betas(size=recipe.noise_size)))
    prediction = PREDICTIONS[recipe.prediction]
    scheduler = SchedulerConfig(recipe.sample_max_value, prediction_type=prediction, trained_betas=betas)
    return StageRelease(recipe.stage, unet, unet_params, scheduler)


def stage_defaults(recipe: Recipe) -> StageDefaults:
    """How a stage draws where nothing else is asked for: as its recipe samples."""
    level = recipe.sample.aug_level if recipe.stage == "super-resolution" else None
    case = recipe.data.preparation.preserve_case
    return StageDefaults(recipe.sample.steps, recipe.sample.guidance_scale, level, case)
