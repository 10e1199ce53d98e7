"""What a recipe trains, as inference and releases know it."""

from __future__ import annotations

import dataclasses

from if_jax.checkpoints.scheduler import PREDICTIONS, SchedulerConfig
from if_jax.checkpoints.stages import StageDefaults, StageRelease
from if_jax.checkpoints.weights import Params
from if_jax.config import Recipe
from if_jax.diffusion.schedule import cosine_betas
from if_jax.models import presets


def make_stage(recipe: Recipe, unet_params: Params) -> StageRelease:
    """The stage that a recipe trains, without its text encoder; it draws pictures of the size it is trained at.

    Args:
      recipe: what is trained.
      unet_params: parameters of its UNet.
    """
    unet = dataclasses.replace(presets.UNETS[recipe.unet], sample_size=recipe.data.size)
    return StageRelease(recipe.stage, unet, unet_params, make_scheduler(recipe))


def make_scheduler(recipe: Recipe) -> SchedulerConfig:
    """The schedule and the prediction that a recipe trains for, and how its pictures are bounded."""
    betas = None if recipe.noise_size == 64 else tuple(map(float, cosine_betas(size=recipe.noise_size)))
    prediction = PREDICTIONS[recipe.prediction]
    variance = "learned_range" if recipe.bound_weight else "fixed_small"  # channels that nothing has trained
    return SchedulerConfig(
        recipe.sample_max_value, prediction_type=prediction, trained_betas=betas, variance_type=variance
    )


def stage_defaults(recipe: Recipe) -> StageDefaults:
    """How a stage draws where nothing else is asked for: as its recipe samples."""
    level = recipe.sample.aug_level if recipe.stage == "super-resolution" else None
    case = recipe.data.preparation.preserve_case
    return StageDefaults(recipe.sample.steps, recipe.sample.guidance_scale, level, case)
