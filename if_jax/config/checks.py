"""What the keys of a recipe must be to each other; what each may be by itself stands at the key."""

from __future__ import annotations

import dataclasses
import re

from if_jax.config.keys import Recipe, ValidationConfig
from if_jax.models import presets


def check(recipe: Recipe) -> None:
    """Refuses a recipe that cannot work.

    Raises:
      ValueError: names the key, its value and what would do.
    """
    _check_training(recipe)
    _check_validation(recipe.validation)
    _check_start(recipe)
    _check_data(recipe)
    _check_networks(recipe)
    _check_sides(recipe)


def _check_training(recipe: Recipe) -> None:
    if recipe.checkpoint_every % recipe.log_every:  # a resumed run must repeat whole windows of the log
        raise ValueError(
            f"recipe key checkpoint_every is {recipe.checkpoint_every}: "
            f"it must be a multiple of log_every {recipe.log_every}"
        )
    if recipe.batch_size % recipe.accumulate:
        raise ValueError(f"recipe key accumulate is {recipe.accumulate}: it must divide batch_size {recipe.batch_size}")
    if not recipe.ema_decays:
        raise ValueError("recipe key ema_decays is empty: give at least one decay, such as 0.9999")
    decays = [(f"ema_decays[{i}]", decay) for i, decay in enumerate(recipe.ema_decays)]
    for key, value in (*decays, ("data.caption_dropout", recipe.data.caption_dropout)):
        if not 0 <= value < 1:
            raise ValueError(f"recipe key {key} is {value}: it must lie in [0, 1)")
    if not 0 <= recipe.pooled_dropout <= 1:
        raise ValueError(f"recipe key pooled_dropout is {recipe.pooled_dropout}: it must lie in [0, 1]")
    if recipe.guard.max_in_a_row < 1 or recipe.guard.spike_factor < 0:
        raise ValueError(f"recipe section guard: {recipe.guard}: max_in_a_row is at least 1, spike_factor at least 0")


def _check_start(recipe: Recipe) -> None:
    try:
        re.compile(recipe.init_only)
    except re.error as error:
        raise ValueError(f"recipe key init_only is {recipe.init_only!r}: no regular expression ({error})") from None
    if recipe.init_only and not recipe.init_from:
        raise ValueError(f"recipe key init_only is {recipe.init_only!r} without init_from: name the stage folder too")


def _check_networks(recipe: Recipe) -> None:
    unet, super_resolution = presets.UNETS[recipe.unet], recipe.stage == "super-resolution"
    if unet.aug_level_embedding != super_resolution:
        kind = "super-resolution" if unet.aug_level_embedding else "base"
        raise ValueError(f"recipe key unet is {recipe.unet!r}, a {kind} net, but stage is {recipe.stage!r}")
    if super_resolution and not recipe.text_encoder_from:
        raise ValueError("recipe key text_encoder_from is empty: name the release folder whose encoder this stage uses")
    width = presets.T5_ENCODERS[recipe.text_encoder].d_model
    if not recipe.text_encoder_from and width != unet.encoder_hid_dim:
        raise ValueError(
            f"recipe key text_encoder is {recipe.text_encoder!r} of width {width}, but {recipe.unet!r} "
            f"reads states of width {unet.encoder_hid_dim}"
        )


def _check_sides(recipe: Recipe) -> None:
    data, halvings = recipe.data, len(presets.UNETS[recipe.unet].block_out_channels) - 1
    side = data.crop or data.size
    if side % 2**halvings:
        raise ValueError(f"pictures of side {side} cannot be halved {halvings} times: use a multiple of {2**halvings}")
    if recipe.stage == "super-resolution" and data.size % data.low_size:
        raise ValueError(f"recipe key data.size is {data.size}: it must be a multiple of data.low_size")
    if data.crop > data.size:
        raise ValueError(f"recipe key data.crop is {data.crop}: it must be at most data.size {data.size}")


def _check_data(recipe: Recipe) -> None:
    data = recipe.data
    if data.embeddings and not recipe.text_encoder_from:
        raise ValueError(
            f"recipe key data.embeddings is {data.embeddings!r} without text_encoder_from: an encoder that is trained "
            "makes other states every step; name the frozen one"
        )
    if not 0.0 <= data.preparation.shift <= 1.0:
        raise ValueError(f"recipe key data.preparation.shift is {data.preparation.shift}: it must be from 0 to 1")
    if outside := [key for key, value in dataclasses.asdict(data.keep).items() if value < 0]:
        raise ValueError(f"recipe key data.keep.{outside[0]} is negative: 0 lets all pass")


def _check_validation(validation: ValidationConfig) -> None:
    if outside := [t for t in (*validation.timesteps, validation.aug_level) if not 0 <= t < 1000]:
        raise ValueError(f"recipe keys validation.timesteps and aug_level: {outside[0]} is not in 0…999")
    if validation.every and (not validation.timesteps or validation.samples < 1 or validation.batch_size < 1):
        raise ValueError("recipe section validation needs timesteps, and at least one of samples and batch_size")
