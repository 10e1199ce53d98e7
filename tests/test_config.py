"""Recipes: defaults are valid, mistakes are named with their value and the fix."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from if_jax.config import Recipe, differences, recipe_to_dict, to_recipe
from if_jax.recipes import default_recipe

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


def test_defaults_round_trip():
    recipe = to_recipe(default_recipe())
    assert recipe == Recipe()
    assert to_recipe(recipe_to_dict(recipe)) == recipe


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
        ({"batch_size": "four"}, r"batch_size is 'four' \(str\): it must be a int"),
        ({"batch_size": True}, r"batch_size is True"),
        ({"batch_size": 0}, r"batch_size is 0: it must be at least 1"),
        ({"stage": "bse"}, r"stage is 'bse': it must be one of base, super-resolution"),
        ({"unet": "IF-I-S"}, r"unet is 'IF-I-S': it must be one of"),
        ({"unet": "demo-II"}, r"unet is 'demo-II', a super-resolution net, but stage is 'base'"),
        ({"text_encoder": "t5-v1_1-small"}, r"of width 512, but 'demo-I' reads states of width 128"),
        ({"data": {"size": 60}}, r"side 60 cannot be halved 3 times: use a multiple of 8"),
        ({"ema_decays": [1.0]}, r"ema_decays\[0\] is 1.0"),
        ({"pooled_dropout": 1.5}, r"pooled_dropout is 1.5: it must lie in \[0, 1\]"),
        ({"mesh": {"rules": "zero"}}, r"mesh.rules is 'zero': it must be one of dp"),
        ({"checkpoint_every": 75}, r"checkpoint_every is 75: it must be a multiple of log_every 50"),
        ({"data": {"embeddings": "cache"}}, r"data.embeddings is 'cache' without text_encoder_from"),
        ({"data": {"preparation": {"shift": 2.0}}}, r"data.preparation.shift is 2.0: it must be from 0 to 1"),
        ({"data": {"keep": {"min_side": -1}}}, r"data.keep.min_side is negative"),
        ({"data": {"keep": {"min_size": 64}}}, r"no key data.keep.min_size .*did you mean data.keep.min_side"),
        ({"optimizer": 3}, r"optimizer is 3: it must hold the keys of a section"),
    ],
)
def test_a_mistake_is_named(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        to_recipe(change)
    assert "\n" not in str(caught.value)


def test_super_resolution_needs_its_text_encoder():
    given = {"stage": "super-resolution", "unet": "demo-II", "data": {"size": 256}}
    with pytest.raises(ValueError, match="text_encoder_from is empty"):
        to_recipe(given)
    assert to_recipe(given | {"text_encoder_from": "somewhere"}).data.low_size == 64


def test_differences_name_the_keys():
    one = Recipe()
    other = dataclasses.replace(one, batch_size=7, data=dataclasses.replace(one.data, size=32))
    assert differences(recipe_to_dict(one), recipe_to_dict(other)) == {"batch_size": (64, 7), "data.size": (64, 32)}
