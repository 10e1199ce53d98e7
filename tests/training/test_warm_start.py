"""Training starts from a release: every weight, or those whose names a pattern picks, at their places on the mesh."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict

from if_jax.checkpoints import release
from if_jax.checkpoints.weights import abstract_params
from if_jax.config import DataConfig, Recipe, to_recipe
from if_jax.parallel.mesh import make_mesh
from if_jax.training import publish
from if_jax.training.stage import make_stage
from if_jax.training.warm_start import start_from_release

MESH = make_mesh(2, 4, 1)


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release") / "cascade"
    release.write_cascade(folder, tiny.stages(), tiny.DEFAULTS)
    return folder


def abstract(text: bool = True, unet=tiny.BASE):
    """Shapes with shardings: matrices split where four divides them, all else replicated."""

    def place(leaf):
        split = leaf.ndim > 1 and leaf.shape[-1] % 4 == 0
        spec = jax.sharding.PartitionSpec(*[None] * (leaf.ndim - 1), "fsdp") if split else jax.sharding.PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.sharding.NamedSharding(MESH, spec))

    trees = {"unet": abstract_params(unet)} | ({"text_encoder": abstract_params(tiny.TEXT)} if text else {})
    return jax.tree.map(place, trees)


def ones(tree):
    return jax.tree.map(lambda leaf: jax.device_put(np.ones(leaf.shape, np.float32), leaf.sharding), tree)


def recipe(folder, only="", stage="base"):
    return Recipe(stage=stage, init_from=str(folder), init_only=only)


def test_all_weights_come_from_the_release(cascade):
    def never():
        raise AssertionError("random weights were made for nothing")

    want = abstract()
    params = start_from_release(recipe(cascade / "stage_I"), want, never)
    base = tiny.stages()[0]
    expected = {"unet": base.unet_params, "text_encoder": base.text_params}
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == jax.tree.map(lambda leaf: leaf.sharding, want)


def test_a_pattern_picks_part_of_the_net(cascade):
    """The rest is random, and may have another shape than the release has."""
    wider = dataclasses.replace(tiny.BASE, layers_per_block=(2, 1))
    want = abstract(unet=wider)
    params = start_from_release(recipe(cascade / "stage_I", "mid_block|text_encoder"), want, lambda: ones(want))
    base, flat = tiny.stages()[0], flatten_dict(params, sep="/")
    np.testing.assert_array_equal(
        flat["unet/mid_block/resnets_0/conv1/kernel"], base.unet_params["mid_block"]["resnets_0"]["conv1"]["kernel"]
    )
    jax.tree.map(np.testing.assert_array_equal, params["text_encoder"], base.text_params)
    others = [leaf for name, leaf in flat.items() if "mid_block" not in name and "text_encoder" not in name]
    assert others and all((np.asarray(leaf) == 1).all() for leaf in others)


@pytest.mark.parametrize(
    ("folder", "stage", "only", "text", "message"),
    [
        ("stage_II", "base", "", True, "is a super-resolution stage, but recipe key stage is 'base'"),
        ("stage_I", "super-resolution", "", False, "is a base stage, but recipe key stage is 'super-resolution'"),
        ("stage_II", "super-resolution", "", False, "holds a net of another shape"),
        ("stage_I", "base", "no_such_block", True, "no weight has such a name"),
        ("nowhere", "base", "", True, "model_index.json"),
    ],
)
def test_what_cannot_be_started_from(cascade, folder, stage, only, text, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        start_from_release(recipe(cascade / folder, only, stage), abstract(text), lambda: None)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction": "v"}, "it predicts 'eps', recipe key prediction is 'v' .set prediction=eps"),
        ({"noise_size": 256}, "another one than that of recipe key noise_size 256 .set noise_size=64"),
    ],
)
def test_a_release_that_was_trained_otherwise_is_refused_unless_asked_for(cascade, changes, message):
    changed = dataclasses.replace(recipe(cascade / "stage_I"), **changes)
    with pytest.raises(ValueError, match=message):
        start_from_release(changed, abstract(), lambda: None)
    asked = dataclasses.replace(changed, init_only="mid_block/resnets_0/conv1/bias")
    assert start_from_release(asked, abstract(), lambda: ones(abstract()))


def test_another_text_encoder_is_refused(cascade, tmp_path):
    other = dataclasses.replace(tiny.stages()[0], text_params=tiny.random_params(tiny.TEXT, 1))
    release.write_stage(tmp_path / "other", other)
    changed = dataclasses.replace(recipe(cascade / "stage_I"), text_encoder_from=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="it reads another text encoder"):
        start_from_release(changed, abstract(text=False), lambda: None)


def test_a_stage_is_released_at_the_size_it_was_trained_at():
    small = Recipe(data=DataConfig(size=32))
    assert make_stage(small, {}).unet_config.sample_size == 32
    later = dataclasses.replace(Recipe(), stage="super-resolution", data=DataConfig(size=128, low_size=64))
    publish._check_enlarged("II", later, 64)
    with pytest.raises(ValueError, match=r"II was trained to enlarge pictures of 64 px .* draws 32 px"):
        publish._check_enlarged("II", later, 32)


def test_a_base_release_without_text_encoder(tmp_path):
    base = dataclasses.replace(tiny.stages()[0], text_params=None, text_config=None, tokenizer=None)
    release.write_stage(tmp_path / "base", base)
    with pytest.raises(ValueError, match="set text_encoder_from as well"):
        start_from_release(recipe(tmp_path / "base"), abstract(), lambda: None)
    assert set(start_from_release(recipe(tmp_path / "base"), abstract(text=False), lambda: None)) == {"unet"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"init_only": "(", "init_from": "x"}, "no regular"), ({"init_only": "a"}, "without init_from")],
)
def test_recipe_keys_are_checked(keys, message):
    with pytest.raises(ValueError, match=f"init_only.*{message}"):
        to_recipe(keys)
