"""Stages that read T5, CLIP's text, both side by side, or a picture's vector. CLIP is tiny, random, and knows nothing.

Each trains, goes on to the same bits, shards, keeps its states, draws from a release, and is refused where no pipeline
of diffusers could hold it.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import record_stores
import tiny
import tiny_clip
from click.testing import CliRunner
from PIL import Image

from if_jax import Cascade, cli
from if_jax.checkpoints import convert, release, run
from if_jax.checkpoints.tensors import Storage
from if_jax.config import (
    ConditioningConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    Recipe,
    SampleConfig,
    ValidationConfig,
    recipe_to_dict,
    to_recipe,
)
from if_jax.data import embed
from if_jax.data.preprocessing import Preparation
from if_jax.data.sources import open_stored
from if_jax.models import conditioning, presets
from if_jax.parallel import mesh as meshes
from if_jax.parallel import rules
from if_jax.training import loop, publish, setup, stage
from if_jax.training.step import TrainState

ENCODERS = ("t5", "clip", "t5+clip", "t5+clip_image")
LONG = 200  # tokens, of a caption that is no shorter


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny CLIP, a T5 in a release, captioned pictures; the nets are of one level."""
    folder = tmp_path_factory.mktemp("encoders")
    tiny_clip.write(folder / "clip")
    release.write_stage(folder / "t5", tiny.on_one_level(tiny.stages()[0]))
    record_stores.write_tars(folder / "tars", 21, 11)
    with tiny.as_presets():
        yield folder


def _recipe(place: Path, encoders: str, **changed: Any) -> Recipe:
    clip = {} if encoders == "t5" else {"clip_from": str(place / "clip")}
    shares: dict[str, Any] = {f"{name}_dropout": 0.5 for name in encoders.split("+") if encoders != "t5"}
    recipe = Recipe(
        unet="tiny-I",
        text_encoder="tiny",
        text_encoder_from="" if encoders == "clip" else str(place / "t5"),
        conditioning=ConditioningConfig(encoders, **clip, **shares),
        batch_size=8,
        steps=4,
        log_every=1,
        checkpoint_every=2,
        ema_decays=(0.9,),
        data=DataConfig(source=str(place / "tars"), size=8, threads=0),
        optimizer=OptimizerConfig(schedule="constant", learning_rate=3e-3, warmup_steps=1),
        sample=SampleConfig(every=0),
    )
    return to_recipe(recipe_to_dict(dataclasses.replace(recipe, **changed)))


def _losses(workdir: Path) -> list[float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def _setup(recipe: Recipe, devices: int = 1) -> tuple[Any, Any]:
    encoders = setup.read_frozen(recipe)
    mesh = meshes.make_mesh(devices=jax.devices()[:devices])
    config = encoders.t5.config if encoders.t5 else None
    return setup.make_setup(recipe, config, mesh, clip=encoders.clip.shapes if encoders.clip else None), encoders


def _batch(recipe: Recipe, encoders: Any) -> dict[str, Any]:
    read = setup.caption_reader(recipe, encoders)
    captions = [f"{number} red cubes" for number in range(recipe.batch_size)]
    image = np.random.default_rng(0).integers(0, 256, (len(captions), 8, 8, 3), np.uint8)
    return {"image": image, **dict(zip(read.names, read(captions), strict=True))}


@pytest.mark.parametrize("encoders", ENCODERS)
def test_what_a_net_is_told_depends_on_each_of_its_encoders(place, encoders):
    """Without compiling a step: the rows of each encoder move what the net says, and dropped ones are zero."""
    parts, opened = _setup(recipe := _recipe(place, encoders))
    batch, config = _batch(recipe, opened), parts.networks.unet.config
    frozen = {"text_encoder": opened.t5.params if opened.t5 else {}, **(opened.clip.params if opened.clip else {})}
    frozen = jax.tree.map(np.asarray, frozen)
    states = jax.jit(parts.networks.encode)(frozen, batch)
    assert states.shape == (8, config.states_length(77), config.states_width)
    assert {name: rows for name, (rows, _) in setup.batch_rows(parts).items()}.keys() == batch.keys()
    params = tiny.random_params(config)
    x, t = jnp.ones((8, 8, 8, 3)), jnp.full((8,), 500)
    say = jax.jit(lambda states: parts.networks.unet.apply({"params": params}, x, t, states))
    whole = say(states)
    for encoder in recipe.encoders if config.text_parts else ():
        dropped = conditioning.keep(config.text_parts, states, {encoder: jnp.arange(8) > 0})
        own = [part for part in config.text_parts if part.encoder == encoder]
        for part, rows in zip(config.text_parts, conditioning.split(config.text_parts, dropped), strict=True):
            assert np.any(rows[0]) == (part not in own) and np.any(rows[1])
        moved = np.abs(say(dropped) - whole).max((1, 2, 3))
        assert moved[0] > 1e-3 and moved[1:].max() < 1e-5


def test_the_tokens_of_t5_alone_are_what_they_were(place):
    recipe = _recipe(place, "t5")
    assert stage.unet_config(recipe, None) is presets.UNETS["tiny-I"]
    parts, opened = _setup(recipe)
    batch = _batch(recipe, opened)
    own = jax.tree.map(np.asarray, opened.t5.params)
    np.testing.assert_array_equal(
        parts.networks.encode({"text_encoder": own}, batch),
        parts.networks.text_encoder.apply({"params": own}, batch["ids"], batch["mask"]),
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"encoders": "t5+bert"}, r"encoders is 't5\+bert': 'bert' is no encoder: join t5, clip, clip_image"),
        ({"encoders": "clip_image", "clip_from": "x"}, "nothing reads the caption"),
        ({"encoders": "t5+t5"}, "an encoder stands twice"),
        ({"encoders": "t5+clip"}, "clip_from is empty, with conditioning.encoders 't5\\+clip'"),
        ({"clip_from": "x"}, "clip_from is 'x', but conditioning.encoders is 't5'"),
        ({"clip_dropout": 0.2}, "clip_dropout is 0.2, but conditioning.encoders 't5' has no clip"),
        ({"encoders": "clip", "clip_from": "x", "text_length": 96}, "text_length is 96, but .* 'clip' has no t5"),
        ({"t5_dropout": 0.2}, "t5_dropout is 0.2 with T5 alone: data.caption_dropout drops captions"),
    ],
)
def test_encoders_that_cannot_be_are_refused_in_one_line(keys, message):
    length = {"text_length": keys.pop("text_length")} if "text_length" in keys else {}
    with pytest.raises(ValueError, match=message) as error:
        to_recipe({"conditioning": keys, **length})
    assert "\n" not in str(error.value)


def test_beside_frozen_weights_t5_alone_is_read():
    keys = {"conditioning": {"encoders": "t5+clip", "clip_from": "x"}, "lora": {"rank": 2}}
    with pytest.raises(ValueError, match=r"encoders is 't5\+clip' with lora\.rank 2"):
        to_recipe({**keys, "init_from": "x", "text_encoder_from": "x"})


def test_a_folder_that_is_no_clip_is_refused(place):
    with pytest.raises(ValueError, match=r"config.json is of a 't5', not of CLIP"):
        setup.read_frozen(_recipe(place, "t5+clip", conditioning=_clip_of(place / "t5" / "text_encoder")))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        setup.read_frozen(_recipe(place, "t5+clip", conditioning=_clip_of(place / "nowhere")))


def _clip_of(folder: Path) -> ConditioningConfig:
    return ConditioningConfig("t5+clip", str(folder))


@pytest.mark.slow
@pytest.mark.parametrize("encoders", ENCODERS)
def test_a_stage_trains_resumes_draws_and_is_refused_by_name(place, tmp_path, encoders):
    validation = ValidationConfig(every=4, samples=8, batch_size=8, timesteps=(100, 900), source=str(place / "tars"))
    watched = {"validation": validation, "sample": SampleConfig(every=4, steps="2", prompts=("a red cube",))}
    watched = watched if encoders == "t5+clip_image" else {}
    whole = _recipe(place, encoders, **watched)
    loop.train(whole, str(tmp_path / "whole"))
    loop.train(dataclasses.replace(whole, steps=2), str(tmp_path / "parts"))
    loop.train(whole, str(tmp_path / "parts"))
    assert np.isfinite(_losses(tmp_path / "whole")).all()
    for expected, actual in zip(
        *(jax.tree.leaves(run.read_ema(str(tmp_path / name))[2]) for name in ("whole", "parts")), strict=True
    ):
        np.testing.assert_array_equal(expected, actual)
    tiny_clip.write(tmp_path / "other", seed=1)
    if encoders != "t5":  # another CLIP in its place
        swapped = dataclasses.replace(whole.conditioning, clip_from=str(tmp_path / "other"))
        with pytest.raises(ValueError, match="was trained with another text encoder than"):
            loop.train(dataclasses.replace(whole, conditioning=swapped, steps=6), str(tmp_path / "parts"))
    publish.publish([str(tmp_path / "whole")], str(tmp_path / "cascade"))
    drawn = _draw(tmp_path / "cascade", encoders)
    if encoders == "t5+clip":
        _check_later_stage(place, tmp_path, encoders)
    model = convert.open_model(tmp_path / "cascade")
    if encoders == "t5":
        convert.write_model(model, tmp_path / "converted", "diffusers", Storage())
        np.testing.assert_array_equal(_draw(tmp_path / "converted", encoders), drawn)
        return
    with pytest.raises(ValueError, match=rf"stage I reads {encoders.replace('+', '.*')}, and the diffusers layout"):
        convert.write_model(model, tmp_path / "converted", "diffusers", Storage())
    assert not (tmp_path / "converted").exists()
    result = CliRunner().invoke(cli.main, ["convert", str(tmp_path / "cascade"), str(tmp_path / "no")])
    assert result.exit_code == 1 and result.output.count("\n") == 1 and "holds a T5 alone" in result.output


def _draw(folder: Path, encoders: str) -> np.ndarray:
    """A prompt, drawn by a release; with a picture's vector, another picture than without."""
    cascade = Cascade.load(folder, stages=1)
    options: Any = {"return_tensors": True, "if_I_kwargs": {"sample_timestep_respacing": "2"}}
    plain = cascade.dream("a red cube", **options)["I"][0]
    assert np.abs(plain - cascade.dream("seven green cones", **options)["I"][0]).max() > 0
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 16, 3), np.uint8))
    if encoders != "t5+clip_image":
        with pytest.raises(ValueError, match="vary: this cascade was trained on captions alone"):
            cascade.dream("a red cube", vary=picture, **options)
        return plain
    varied = cascade.dream("a red cube", vary=picture, **options)["I"][0]
    assert np.abs(plain - varied).max() > 0
    again = cascade.dream(vary=[picture, picture], **options)["I"]
    assert len(again) == 2
    return plain


def _check_later_stage(place: Path, tmp_path: Path, encoders: str) -> None:
    """A second stage trains on the encoders that the release of the first brings, and joins it."""
    own = dataclasses.replace(_recipe(place, encoders).conditioning, clip_from="")
    keys = {"stage": "super-resolution", "unet": "tiny-II", "text_encoder_from": str(tmp_path / "cascade")}
    data = DataConfig(source=str(place / "tars"), size=16, low_size=8, threads=0)
    recipe = _recipe(place, "t5", **keys, data=data, conditioning=own, steps=2)
    loop.train(recipe, str(tmp_path / "second"))
    publish.publish([str(tmp_path / "whole"), str(tmp_path / "second")], str(tmp_path / "two"))
    stages, _ = release.read_cascade(tmp_path / "two", None)
    assert len(stages) == 2 and stages[1].text_encoder_sha256 == stages[0].states_sha256
    with pytest.raises(ValueError, match="another text encoder"):
        other = dataclasses.replace(stages[1], text_encoder_sha256="0" * 64)
        release.write_cascade(tmp_path / "wrong", [stages[0], other], tiny.DEFAULTS)


def _one_step(recipe: Recipe, devices: int) -> tuple[float, TrainState]:
    """Loss and state of one step from a run's own first weights, on so many devices."""
    parts, encoders = _setup(recipe, devices)
    sharding = rules.batch_sharding(parts.mesh, parts.sharding_rules)
    with jax.set_mesh(parts.mesh):
        abstract = setup.abstract_state(parts)
        frozen = setup.place_frozen(parts, encoders, None)
        step = setup.lower_step(parts, abstract, frozen).compile()
        state = setup.fresh_state(parts, abstract, encoders.t5)
        state, metrics = step(state, frozen, jax.device_put(_batch(recipe, encoders), sharding))
        return float(metrics["loss"]), jax.device_get(state)


@pytest.mark.slow
@pytest.mark.parametrize("encoders", ENCODERS)
def test_eight_devices_train_as_one(place, encoders):
    one = _one_step(_recipe(place, encoders), 1)
    spread = _one_step(_recipe(place, encoders, mesh=MeshConfig(data=2, fsdp=4, rules="fsdp")), 8)
    assert spread[0] == pytest.approx(one[0], rel=1e-5)
    for expected, actual in zip(jax.tree.leaves(one[1].params), jax.tree.leaves(spread[1].params), strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("encoders", ENCODERS)
def test_states_are_kept_and_trained_on(place, tmp_path, encoders):
    recipe = _recipe(place, encoders, steps=2, compute_dtype="bfloat16")
    loop.train(recipe, str(tmp_path / "online"))
    parts, opened = _setup(recipe)
    text_parts = parts.networks.unet.config.text_parts
    embed.embed(
        open_stored(str(place / "tars")),
        opened,
        tmp_path / "states",
        form="exact",
        preparation=Preparation(),
        mesh=meshes.make_mesh(devices=jax.devices()[:1]),
        sharding_rules=rules.PRESETS["dp"],
        batch_size=8,
        parts=text_parts,
    )
    kept = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, embeddings=str(tmp_path / "states")))
    loop.train(kept, str(tmp_path / "kept"))
    np.testing.assert_allclose(_losses(tmp_path / "kept"), _losses(tmp_path / "online"), rtol=5e-3)
    longer = dataclasses.replace(kept, text_length=96)
    message = "has no t5, whose tokens" if encoders == "clip" else "made with another length or width of text states"
    with pytest.raises(ValueError, match=message):
        loop.train(to_recipe(recipe_to_dict(longer)), str(tmp_path / "longer"))


@pytest.mark.slow
def test_captions_of_200_tokens_train_and_draw(place, tmp_path):
    """What stands behind token 77 reaches the picture, and no pipeline of diffusers would read it."""
    loop.train(_recipe(place, "t5", text_length=LONG), str(tmp_path / "run"))  # what text says begins at zero
    publish.publish([str(tmp_path / "run")], str(tmp_path / "cascade"))
    cascade = Cascade.load(tmp_path / "cascade")
    beginning = "a red cube " * 9  # 99 bytes
    states = cascade.embed([beginning + "and a blue ball", beginning + "and a green one"], clean_caption=False)
    assert states.shape == (2, LONG, 32) and np.abs(states[0] - states[1]).max() > 0
    options: Any = {"return_tensors": True, "if_I_kwargs": {"sample_timestep_respacing": "2"}}
    pictures = [cascade.dream(beginning + end, **options)["I"][0] for end in ("and a blue ball", "and a green one")]
    assert np.abs(pictures[0] - pictures[1]).max() > 0
    with pytest.raises(ValueError, match="reads captions of 200 tokens, and pipelines of the diffusers layout 77"):
        convert.write_model(convert.open_model(tmp_path / "cascade"), tmp_path / "no", "diffusers", Storage())
