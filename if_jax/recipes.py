"""What the files in `configs/` share: the defaults, IF's own settings, and the forms a recipe comes in."""

from __future__ import annotations

import dataclasses

import ml_collections

from if_jax.config import Recipe

FORMS = ("smoke", "full_frame")


def default_recipe() -> ml_collections.ConfigDict:
    """A ConfigDict holding every key at its default."""
    return ml_collections.ConfigDict(dataclasses.asdict(Recipe()))


def if_recipe(stage: str) -> ml_collections.ConfigDict:
    """What IF's stages have in common; net, batch, steps and mesh are left to the file of each.

    Learning rates are those of IF-I-L as published. Later stages see 64 px crops of 256 px pictures.
    """
    config = default_recipe()
    config.stage = stage
    config.text_encoder_from = "t5-v1_1-xxl"  # the folder as published, see README "T5 alone"
    config.compute_dtype = "bfloat16"
    config.ema_decays = (0.9999, 0.999)
    config.optimizer.schedule = "one-cycle"
    config.optimizer.initial_learning_rate = 4e-6
    config.optimizer.learning_rate = 1e-4
    config.optimizer.final_learning_rate = 1e-8
    config.optimizer.warmup_steps = 10_000
    config.mesh.rules = "fsdp"
    config.validation.every = config.checkpoint_every = config.sample.every = 5_000
    if stage == "super-resolution":
        config.sample_max_value = 1.0
        config.data.size, config.data.low_size, config.data.crop = 256, 64, 64
        config.sample.steps = "smart50"
    return config


def in_form(config: ml_collections.ConfigDict, form: str) -> ml_collections.ConfigDict:
    """The recipe as it is (""), or in another form, as `--config configs/if_II_M.py:FORM` asks for it.

    "full_frame": the phase that follows the training on crops, started with `init_from`.
    "smoke": the same recipe with the demo's narrow nets and few steps: everything runs, on any machine, in minutes.
    Raises ValueError for any other form, and for the full frame of a stage that is not trained on crops.
    """
    if form not in ("", *FORMS) or (form == "full_frame" and not config.data.crop):
        known = [word for word in FORMS if word == "smoke" or config.data.crop]
        raise ValueError(f"recipe form {form!r} is unknown for {config.unet}: leave it out or use {' or '.join(known)}")
    if form == "full_frame":
        _full_frame(config)
    elif form == "smoke":
        _smoke(config)
    return config


def _full_frame(config: ml_collections.ConfigDict) -> None:
    """Crops see other statistics in their norms than whole pictures do. 48 pictures are computed at a time."""
    config.data.crop = 0
    config.accumulate = config.batch_size // 48
    config.steps = 100_000
    config.optimizer.learning_rate = 1e-5


def _smoke(config: ml_collections.ConfigDict) -> None:
    later = config.stage == "super-resolution"
    config.unet = "demo-II" if later else "demo-I"
    if config.text_encoder_from:
        config.text_encoder_from = "if_jax/demo/stage_I"
    config.batch_size, config.accumulate, config.steps = 8, min(config.accumulate, 2), 10
    config.data.size, config.data.low_size = (256, 64) if later else (64, 64)
    config.data.crop = 64 if config.data.crop else 0
    config.optimizer.warmup_steps = 2
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = -1, 1, 1
    config.log_every, config.checkpoint_every = 5, 10
    config.validation.every, config.validation.samples, config.validation.batch_size = 10, 8, 8
    config.sample.every, config.sample.steps = 10, "5"
