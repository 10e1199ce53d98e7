"""What the files in `configs/` share: the defaults, IF's own settings, and the forms a recipe comes in.

A recipe file states what differs from the defaults, by keys as the command line spells them ("data.size"). A form is a
table of further keys by name: `--config configs/demo_base.py:pairs` is the recipe with the keys of its form "pairs".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections

from if_jax.checkpoints.stages import StageKind
from if_jax.config import Recipe

Settings = Mapping[str, Any]  # dotted keys and their values

IF_SETTINGS: Settings = {
    "text_encoder_from": "t5-v1_1-xxl",  # the folder as published, see docs/convert.md
    "compute_dtype": "bfloat16",
    "ema_decays": (0.9999, 0.999),
    "optimizer.schedule": "one-cycle",
    "optimizer.initial_learning_rate": 4e-6,  # the rates are those of IF-I-L as published
    "optimizer.learning_rate": 1e-4,
    "optimizer.final_learning_rate": 1e-8,
    "optimizer.warmup_steps": 10_000,
    "mesh.rules": "fsdp",
    "validation.every": 5_000,
    "checkpoint_every": 5_000,
    "sample.every": 5_000,
}
IF_LATER_SETTINGS: Settings = {
    "sample_max_value": 1.0,
    "data.size": 256,
    "data.low_size": 64,
    "data.crop": 64,
    "sample.steps": "smart50",
}


def default_recipe(settings: Settings | None = None) -> ml_collections.ConfigDict:
    """A ConfigDict that holds every key.

    Args:
      settings: values of dotted keys, in place of their defaults.

    Returns:
      The recipe, which may be changed further: `config.data.size = 32`.
    """
    config = ml_collections.ConfigDict(dataclasses.asdict(Recipe()))
    config.update_from_flattened_dict(dict(settings or {}))
    return config


def if_recipe(stage: StageKind, settings: Settings, form: str = "", tpu_unet: str = "") -> ml_collections.ConfigDict:
    """A recipe of one of IF's stages, in any of its forms.

    Later stages see 64 px crops of 256 px pictures. "full_frame" is the phase that follows, started with `init_from`:
    crops see other statistics in their norms than whole pictures do.

    Args:
      stage: its kind.
      settings: what this stage has for itself: net, batch, steps, mesh.
      form: "", "smoke", "tpu" where there is such a net, or "full_frame" of a later stage.
      tpu_unet: the net of form "tpu", whose widths fill a TPU's matrix unit.

    Returns:
      The recipe.

    Raises:
      ValueError: there is no such form.
    """
    later = stage == "super-resolution"
    config = default_recipe({"stage": stage, **IF_SETTINGS, **(IF_LATER_SETTINGS if later else {}), **settings})
    whole = {
        "data.crop": 0,
        "accumulate": settings["batch_size"] // 48,  # pictures at a time
        "steps": 100_000,
        "optimizer.learning_rate": 1e-5,
    }
    forms: dict[str, Settings] = {"full_frame": whole} if later else {}
    return in_form(config, form, forms | ({"tpu": {"unet": tpu_unet}} if tpu_unet else {}))


def in_form(
    config: ml_collections.ConfigDict, form: str, forms: Mapping[str, Settings] | None = None
) -> ml_collections.ConfigDict:
    """The recipe as it is, or in another form, as `--config configs/if_II_M.py:FORM` asks for it.

    Args:
      config: the recipe; it is changed.
      form: "" for the recipe as it is; "smoke" for the same with the demo's narrow nets and few steps, so that
        everything runs, on any machine, in minutes; or one of `forms`.
      forms: what each further form of this recipe sets, by dotted keys.

    Returns:
      The same ConfigDict.

    Raises:
      ValueError: there is no such form.
    """
    known: dict[str, Settings] = {"": {}, "smoke": _smoke(config.to_dict()), **(forms or {})}
    if form not in known:
        words = " or ".join(filter(None, known))
        raise ValueError(f"recipe form {form!r} is unknown for {config['unet']}: leave it out or use {words}")
    config.update_from_flattened_dict(dict(known[form]))
    return config


def _smoke(raw: dict[str, Any]) -> Settings:
    later = raw["stage"] == "super-resolution"
    start: dict[str, Any] = {}
    if raw["init_from"]:  # then what the demo was trained for
        start = {"init_from": f"if_jax/demo/stage_{'II' if later else 'I'}", "prediction": "x0" if later else "v"}
        start["noise_size"] = 64 if later else 512
    return start | {
        "unet": "demo-II" if later else "demo-I",
        "text_encoder_from": "if_jax/demo/stage_I" if raw["text_encoder_from"] else "",
        "batch_size": 8,
        "accumulate": min(raw["accumulate"], 2),
        "steps": 10,
        "data.size": 256 if later else 64,
        "data.low_size": 64,
        "data.crop": 64 if raw["data"]["crop"] else 0,
        "optimizer.warmup_steps": 2,
        "mesh.data": -1,
        "mesh.fsdp": 1,
        "mesh.tensor": 1,
        "log_every": 5,
        "checkpoint_every": 10,
        "validation.every": 10,
        "validation.samples": 8,
        "validation.batch_size": 8,
        "sample.every": 10,
        "sample.steps": "5",
    }
