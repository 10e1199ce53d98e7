"""What a recipe trains, as inference and releases know it."""

from __future__ import annotations

import dataclasses

from if_jax.checkpoints.scheduler import PREDICTIONS, SchedulerConfig
from if_jax.checkpoints.stages import StageDefaults, StageRelease
from if_jax.checkpoints.weights import Params
from if_jax.config import Recipe
from if_jax.diffusion.schedule import cosine_betas
from if_jax.models import presets
from if_jax.models.conditioning import CLIPShapes, parts_of
from if_jax.models.unet import UNetConfig


def unet_config(recipe: Recipe, clip: CLIPShapes | None) -> UNetConfig:
    """The UNet that a recipe trains.

    Args:
      recipe: what is trained.
      clip: what its stage reads of a CLIP, where it reads one.
    """
    preset = presets.UNETS[recipe.unet]
    t5 = (recipe.text_length, preset.encoder_hid_dim) if "t5" in recipe.encoders else None
    parts = parts_of(t5, clip, recipe.conditioning.image_tokens)
    if not parts:
        return preset
    try:
        return dataclasses.replace(preset, encoder_hid_dim=parts[0].width, text_parts=parts)
    except ValueError as error:
        raise ValueError(f"recipe key conditioning.encoders is {recipe.conditioning.encoders!r}: {error}") from None


def make_stage(recipe: Recipe, unet_params: Params, clip: CLIPShapes | None = None) -> StageRelease:
    """The stage that a recipe trains, without its text encoder; it draws pictures of the size it is trained at.

    Args:
      recipe: what is trained.
      unet_params: parameters of its UNet.
      clip: see `unet_config`.
    """
    unet = dataclasses.replace(unet_config(recipe, clip), sample_size=recipe.data.size)
    return StageRelease(recipe.stage, unet, unet_params, make_scheduler(recipe))


def make_scheduler(recipe: Recipe) -> SchedulerConfig:
    """The schedule and the prediction that a recipe trains for, and how its pictures are bounded."""
    betas = None if recipe.noise_size == 64 else tuple(map(float, cosine_betas(size=recipe.noise_size)))
    prediction = PREDICTIONS[recipe.prediction]
    variance = "learned_range" if recipe.bound_weight else "fixed_small"  # channels that nothing has trained
    config = SchedulerConfig(
        recipe.sample_max_value, prediction_type=prediction, trained_betas=betas, variance_type=variance
    )
    return dataclasses.replace(config, sampler="ddim", timestep_spacing="trailing") if recipe.distill.method else config


def stage_defaults(recipe: Recipe) -> StageDefaults:
    """How a stage draws where nothing else is asked for: as its recipe samples, a student as it was taught."""
    level = recipe.sample.aug_level if recipe.stage == "super-resolution" else None
    highest = 999 if level is None else recipe.data.max_aug_level
    case, length = recipe.data.preparation.preserve_case, recipe.text_length
    steps, guidance = recipe.sample.steps, recipe.sample.guidance_scale
    if recipe.distill.method:
        steps, guidance = f"trailing{recipe.distill.steps}", 1.0
    return StageDefaults(steps, guidance, level, case, length, highest)
