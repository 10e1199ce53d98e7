"""The fixed-timestep loss: the same figures on any number of devices and in any batches; other weights, others."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from if_jax.checkpoints.weights import abstract_params
from if_jax.config import DataConfig, Recipe, ValidationConfig
from if_jax.data import pipeline
from if_jax.models.t5 import T5Encoder
from if_jax.models.unet import UNet
from if_jax.parallel import mesh as meshes
from if_jax.parallel import rules
from if_jax.text.clip_tokens import CaptionReader
from if_jax.training import objective, validation

SETTINGS = ValidationConfig(every=1, samples=11, batch_size=8, timesteps=(50, 950), aug_level=250)
BASE = Recipe(data=DataConfig(size=8), validation=SETTINGS)
SUPER_RESOLUTION = dataclasses.replace(
    BASE, stage="super-resolution", text_encoder_from="x", data=DataConfig(size=8, low_size=4)
)
LENGTH = 9


def _tokenize(captions, length=LENGTH, always_warn=False):
    """The first bytes of every caption."""
    ids = np.array([[3 + byte for byte in caption.encode()[:LENGTH].ljust(LENGTH)] for caption in captions], np.int32)
    return ids, np.ones_like(ids)


def _pictures(
    source, *, size, batch_size, seed, tokenize, text_names=(), caption_dropout=0.0, threads=0, preparation=None
):
    """What the pipeline promises, without its drawing: sample n is the same whatever the batch."""
    assert source == "scenes" and caption_dropout == 0.0
    for start in itertools.count(0, batch_size):
        drawn = [np.random.default_rng((seed, n)) for n in range(start, start + batch_size)]
        ids, mask = tokenize([f"{n} cubes" for n in range(start, start + batch_size)])
        image = np.stack([rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for rng in drawn])
        yield {"image": image, "ids": ids, "mask": mask}


@pytest.fixture(scope="module", autouse=True)
def quick_pictures():
    opened = pipeline.open_source
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "open_source", lambda name, *rest: name if name == "scenes" else opened(name, *rest))
        patch.setattr(pipeline, "batches", _pictures)
        yield


class _Pointwise:
    """A UNet of few weights that reads all it is given: the figures' rules do not depend on the net."""

    def apply(self, variables, x, t, states, level):
        p, time = variables["params"], t[:, None, None, None] / 1000
        y = jnp.tanh(x @ p["in"]) * (1 + time) + states.mean((1, 2))[:, None, None, None]
        return (y if level is None else y + level[:, None, None, None] / 1000) @ p["out"]


class _Table:
    """A text encoder of one table."""

    def apply(self, variables, ids, mask):
        return variables["params"]["table"][ids]


def _params(stage, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32) / 2  # noqa: E731
    unet = {"in": draw(3 if stage == "base" else 6, 8), "out": draw(8, 6)}
    return {"unet": unet} | ({"text_encoder": TEXT} if stage == "base" else {})


TEXT = {"table": np.random.default_rng(9).standard_normal((260, 4)).astype(np.float32)}


def _validate(recipe, devices=1):
    """The recipe's validation on so many devices, as a function of the parameters' seed."""
    mesh = meshes.make_mesh(devices=jax.devices()[:devices])
    whole, split = rules.replicated(mesh), rules.batch_sharding(mesh, rules.PRESETS["dp"])
    frozen = {} if recipe.stage == "base" else {"text_encoder": TEXT}
    networks = objective.Networks(_Pointwise(), _Table())
    made = validation.make_validation(
        recipe, networks, CaptionReader(_tokenize, length=LENGTH), jax.device_put(frozen, whole), split
    )

    def validate(seed=0):
        with jax.set_mesh(mesh):
            return made(jax.device_put(_params(recipe.stage, seed), whole))

    return validate


@pytest.fixture(scope="module")
def on_one_device():
    validate = _validate(BASE)
    return validate, validate()


def _with(**changed):
    return dataclasses.replace(BASE, validation=dataclasses.replace(SETTINGS, **changed))


def _assert_same(figures, want):
    assert figures.keys() == want.keys()
    np.testing.assert_allclose(list(figures.values()), list(want.values()), rtol=1e-5)


def test_figures_are_named_by_timestep(on_one_device):
    _, figures = on_one_device
    assert list(figures) == ["validation/t050", "validation/t950", "validation/mean"]
    assert figures["validation/mean"] == pytest.approx(
        (figures["validation/t050"] + figures["validation/t950"]) / 2, rel=1e-12
    )
    assert all(isinstance(value, float) and np.isfinite(value) and value > 0 for value in figures.values())


def test_the_same_weights_have_the_same_figures_and_others_do_not(on_one_device):
    validate, figures = on_one_device
    assert validate() == figures
    assert abs(validate(seed=1)["validation/mean"] / figures["validation/mean"] - 1) > 1e-3


def test_eight_devices_find_the_figures_of_one(on_one_device):
    _assert_same(_validate(BASE, devices=8)(), on_one_device[1])


@pytest.mark.parametrize("batch_size", [4, 16])
def test_the_batch_size_does_not_matter(on_one_device, batch_size):
    """Eleven samples: two batches of eight hold five too many, three of four hold one, one of sixteen holds five."""
    _assert_same(_validate(_with(batch_size=batch_size))(), on_one_device[1])


def test_a_batch_that_does_not_divide_over_the_devices_is_enlarged(on_one_device):
    _assert_same(_validate(_with(batch_size=3), devices=8)(), on_one_device[1])


def test_it_is_the_mean_error_of_the_prediction_on_the_first_samples(on_one_device):
    """By hand for one timestep, with the pictures and the noise it should have used."""
    source = _pictures("scenes", size=8, batch_size=11, seed=SETTINGS.seed, tokenize=_tokenize)
    batch, params = next(source), _params("base")
    key = jax.random.key(SETTINGS.seed)
    eps = [jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, n), 950), (8, 8, 3)) for n in range(11)]
    schedule = objective.training_schedule(BASE)
    a = float(schedule.alpha_bar[950])
    x_t = a**0.5 * (batch["image"] / 127.5 - 1) + (1 - a) ** 0.5 * np.asarray(eps)

    states = _Table().apply({"params": params["text_encoder"]}, batch["ids"], batch["mask"])
    output = _Pointwise().apply({"params": params["unet"]}, np.float32(x_t), np.full(11, 950), states, None)
    error = np.mean((np.asarray(output[..., :3]) - np.asarray(eps)) ** 2)
    assert on_one_device[1]["validation/t950"] == pytest.approx(float(error), rel=1e-5)


def test_super_resolution_on_eight_devices_in_other_batches():
    figures = _validate(SUPER_RESOLUTION)()
    changed = dataclasses.replace(SETTINGS, batch_size=16)
    _assert_same(_validate(dataclasses.replace(SUPER_RESOLUTION, validation=changed), devices=8)(), figures)
    cleaner = dataclasses.replace(SETTINGS, aug_level=0)
    other = _validate(dataclasses.replace(SUPER_RESOLUTION, validation=cleaner))()
    assert other["validation/mean"] != figures["validation/mean"]


@pytest.mark.parametrize("recipe", [BASE, SUPER_RESOLUTION], ids=lambda recipe: recipe.stage)
def test_the_real_nets_take_what_it_shows_them(recipe):
    config = tiny.one_level(tiny.BASE if recipe.stage == "base" else tiny.SUPER_RESOLUTION)
    networks = objective.Networks(UNet(config), T5Encoder(tiny.TEXT))
    params = {"unet": abstract_params(config), "text_encoder": abstract_params(tiny.TEXT)}
    words = jax.ShapeDtypeStruct((4, LENGTH), np.int32)
    batch = {"image": jax.ShapeDtypeStruct((4, 8, 8, 3), np.uint8), "ids": words, "mask": words}
    error = validation._make_error(recipe, networks)
    figures = jax.eval_shape(error, params, {}, batch, jax.ShapeDtypeStruct((4,), np.int32))
    assert figures.shape == (2, 4) and figures.dtype == np.float32


def test_held_out_pictures_that_are_not_there_are_refused_before_the_run():
    recipe = dataclasses.replace(Recipe(), validation=ValidationConfig(every=5, source="nowhere/at_all"))
    with pytest.raises(ValueError, match=r"recipe key validation.source is 'nowhere/at_all': .*does not exist"):
        validation.check_source(recipe)
    unused = dataclasses.replace(recipe.validation, every=0)
    validation.check_source(dataclasses.replace(recipe, validation=unused))
