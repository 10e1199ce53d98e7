"""Recipes: defaults are valid, mistakes are named with their value and the fix."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from if_jax.config import Recipe, check_override, differences, for_compiling, recipe_to_dict, resumable, to_recipe
from if_jax.recipes import default_recipe

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


def test_defaults_round_trip():
    recipe = to_recipe(default_recipe())
    assert recipe == Recipe()
    assert to_recipe(recipe_to_dict(recipe)) == recipe


def test_the_home_folder_is_known_in_a_recipe(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = to_recipe({"text_encoder_from": "~/encoder", "init_from": "~/I", "data": {"embeddings": "~/states"}})
    folders = (recipe.text_encoder_from, recipe.init_from, recipe.data.embeddings)
    assert folders == tuple(str(tmp_path / name) for name in ("encoder", "I", "states"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_file_is_valid(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert to_recipe(module.get_config()).steps > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bacth_size": 4}, r"no key bacth_size \(value 4\): did you mean batch_size"),
        ({"data": {"sise": 4}}, r"no key data.sise .*did you mean data.size"),
        ({"batch_size": "four"}, r"batch_size is 'four' \(str\): it must be an int"),
        ({"batch_size": True}, r"batch_size is True"),
        ({"batch_size": 0}, r"batch_size is 0: it must be at least 1"),
        ({"stage": "bse"}, r"stage is 'bse': it must be one of base, super-resolution"),
        ({"unet": "IF-I-S"}, r"unet is 'IF-I-S': it must be one of"),
        ({"unet": "demo-II"}, r"unet is 'demo-II', a super-resolution net, but stage is 'base'"),
        ({"text_encoder": "t5-v1_1-small"}, r"of width 512, but 'demo-I' reads states of width 128"),
        ({"data": {"size": 60}}, r"side 60 cannot be halved 3 times: use a multiple of 8"),
        ({"ema_decays": [1.0]}, r"ema_decays\[0\] is 1.0"),
        ({"pooled_dropout": 1.5}, r"pooled_dropout is 1.5: it must be at least 0 and at most 1"),
        ({"mesh": {"rules": "zero"}}, r"mesh.rules is 'zero': it must be one of dp"),
        ({"checkpoint_every": 75}, r"checkpoint_every is 75: it must be a multiple of log_every 50"),
        ({"data": {"embeddings": "cache"}}, r"data.embeddings is 'cache' without text_encoder_from"),
        ({"data": {"preparation": {"shift": 2.0}}}, r"data.preparation.shift is 2.0: it must be from 0 to 1"),
        ({"data": {"remote": {"cache_size": "20"}}}, r"data.remote.cache_size is '20': size '20' is not understood"),
        ({"data": {"keep": {"min_side": -1}}}, r"data.keep.min_side is negative"),
        ({"data": {"keep": {"min_size": 64}}}, r"no key data.keep.min_size .*did you mean data.keep.min_side"),
        ({"optimizer": 3}, r"optimizer is 3: it must hold the keys of a section"),
        ({"optimizer": {"name": "adam"}}, r"optimizer.name is 'adam': it must be one of adamw, adafactor, muon"),
        ({"prediction": ["v"]}, r"prediction is \['v'\]: it must be one of eps, v, x0"),
        ({"optimizer": {"learning_rate": float("nan")}}, r"optimizer.learning_rate is nan: it must be above 0"),
        ({"optimizer": {"learning_rate": -1.0}}, r"optimizer.learning_rate is -1.0: it must be above 0"),
        ({"optimizer": {"clip_norm": 0}}, r"optimizer.clip_norm is 0.0: it must be above 0"),
        ({"optimizer": {"b2": 1.0}}, r"optimizer.b2 is 1.0: it must be at least 0 and below 1"),
        ({"optimizer": {"lr": 1e-4}}, r"no key optimizer.lr .*did you mean optimizer.learning_rate"),
        ({"sample": {"guidance_scale": float("inf")}}, r"sample.guidance_scale is inf: it must be a finite number"),
        ({"data": {"keep": {"min_clip": float("nan")}}}, r"data.keep.min_clip is nan: it must be a finite number"),
        ({"guard": {"grace_steps": 0}}, r"guard.grace_steps is 0: it must be at least 1"),
        ({"guard": {"spike_factor": 0.5}}, r"guard.spike_factor is 0.5: .*above 1, or 0"),
        ({"sample_max_value": 0.5}, r"sample_max_value is 0.5: it must be at least 1"),
        ({"data": {"low_size": 0}}, r"data.low_size is 0: it must be at least 1"),
        ({"data": {"size": -8}}, r"data.size is -8: it must be at least 8"),
        ({"data": {"source": " "}}, r"data.source is empty: name a source"),
        ({"sample": {"steps": "smart60"}}, r"sample.steps is 'smart60': .*use one of .*smart50"),
        ({"sample": {"aug_level": 5000}}, r"sample.aug_level is 5000: it must be at least 0 and at most 999"),
        ({"sample": {"prompts": []}}, r"sample.prompts is empty: give at least one prompt, or set sample.every=0"),
        ({"validation": {"timesteps": [5, 1000]}}, r"validation.timesteps\[1\] is 1000: .*at most 999"),
        ({"validation": {"every": 5, "timesteps": []}}, r"validation.timesteps is empty"),
        ({"seed": -1}, r"seed is -1: it must be at least 0"),
        ({"hosts": {"start_seconds": 0}}, r"hosts.start_seconds is 0: it must be at least 1"),
        ({"wandb": "None"}, r"wandb is 'None', .*leave it empty"),
        ({"text_encoder_from": "null"}, r"text_encoder_from is 'null', .*leave it empty"),
        ({"steps": 1e5}, r"steps is 100000.0 \(float\): it must be an int, write 100000"),
        ({"text_encoder": "t6"}, r"text_encoder is 't6': it must be one of .*demo"),
    ],
)
def test_a_mistake_is_named(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        to_recipe(change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("steps", "1e5", "recipe key steps is '1e5': it must be an int, write 100000"),
        ("steps", "many", "recipe key steps is 'many': it must be an int"),
        ("optimizer.lr", "1e-4", "no key optimizer.lr .*did you mean optimizer.learning_rate"),
        ("optimizer", "adam", "optimizer is 'adam': it must hold the keys of a section; .*optimizer.name"),
        ("data.preparation", "x", "data.preparation is 'x': it must hold the keys"),
        ("batch_size.x", "3", "no key batch_size.x .*: batch_size is a key"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(key, text, message):
    with pytest.raises(ValueError, match=message):
        check_override(key, text)
    check_override("optimizer.learning_rate", "2e-4")
    check_override("ema_decays[0]", "0.99")


def test_super_resolution_needs_its_text_encoder():
    settings = {"stage": "super-resolution", "unet": "demo-II", "data": {"size": 256}}
    with pytest.raises(ValueError, match="text_encoder_from is empty"):
        to_recipe(settings)
    assert to_recipe(settings | {"text_encoder_from": "somewhere"}).data.low_size == 64
    noised = settings | {"text_encoder_from": "somewhere", "data": {"size": 256, "max_aug_level": 50}}
    with pytest.raises(ValueError, match=r"sample\.aug_level is 100: more noise than data\.max_aug_level 50"):
        to_recipe(noised)


def test_differences_name_the_keys():
    recipe = Recipe()
    other = dataclasses.replace(recipe, batch_size=7, data=dataclasses.replace(recipe.data, size=32))
    assert differences(recipe_to_dict(recipe), recipe_to_dict(other)) == {"batch_size": (64, 7), "data.size": (64, 32)}


def _names(section=Recipe, prefix=""):
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(field.default):
            yield from _names(field.default, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def test_every_key_says_whether_it_may_change_on_resuming():
    """How long, how often, where, and what is looked at; nothing that the weights follow from."""
    free = {name for name in _names() if resumable(name)}
    own = ("data.", "posthoc_ema.")
    sections = {name.partition(".")[0] for name in free if "." in name and not name.startswith(own)}
    assert sections == {"mesh", "validation", "hosts", "sample"}
    assert {name for name in free if name.partition(".")[0] not in sections} == {
        *("steps", "log_every", "checkpoint_every", "keep_checkpoints", "keep_every", "init_from", "init_only"),
        *("init_copy", "wandb", "accumulate", "data.threads", "data.workers", "posthoc_ema.every", "posthoc_ema.dtype"),
        *("data.remote.cache_folder", "data.remote.cache_size", "data.remote.requester_pays"),
    }
    assert not resumable("data.preparation.shift") and not resumable("guard.grace_steps")


def _changed(section, name):
    head, _, rest = name.partition(".")
    value = getattr(section, head)
    if rest:
        other = _changed(value, rest)
    elif isinstance(value, bool):
        other = not value
    else:
        other = value[1:] + value[:1] + type(value)("x") if isinstance(value, str | tuple) else value + 1
    return dataclasses.replace(section, **{head: other})


@pytest.mark.parametrize("name", sorted(_names()))
def test_the_compiled_step_is_known_by_what_it_depends_on(name):
    """Other pictures, and other looks at the run, compile nothing anew."""
    outside = ("validation.", "sample.", "hosts.", "wandb", "log_every", "checkpoint_every", "keep_", "init_")
    outside += ("data.source", "data.seed", "data.caption_dropout", "data.threads", "data.workers", "data.preparation.")
    outside += ("data.keep.", "data.remote.", "data.exclude", "posthoc_ema.every", "posthoc_ema.dtype")
    outside += ("distill.teacher",)
    changed = _changed(Recipe(), name)
    assert changed != Recipe()
    assert (for_compiling(changed) == for_compiling(Recipe())) == name.startswith(outside)
