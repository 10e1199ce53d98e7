"""Training of factors beside frozen weights: what is trained, what is kept, that it resumes, what is refused."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import interrupted_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import record_stores
import tiny

from if_jax.checkpoints import lora as lora_files
from if_jax.checkpoints import release, run
from if_jax.checkpoints.stages import Encoders
from if_jax.checkpoints.weights import boxed_params
from if_jax.config import (
    DataConfig,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    Recipe,
    SampleConfig,
    recipe_to_dict,
    to_recipe,
)
from if_jax.data import embed, sources
from if_jax.models import lora, presets
from if_jax.parallel import rules
from if_jax.training import loop, memory, publish, warm_start

NETS = {"tiny-I": tiny.one_level(tiny.BASE), "tiny-II": tiny.one_level(tiny.SUPER_RESOLUTION)}


@pytest.fixture(scope="module", autouse=True)
def tiny_presets():
    with tiny.as_presets():
        yield


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_on_one_level(tmp_path_factory.mktemp("release") / "cascade")


def recipe_of(cascade: Path, **changes: Any) -> Recipe:
    recipe = Recipe(
        unet="tiny-I",
        text_encoder_from=str(cascade / "stage_I"),
        init_from=str(cascade / "stage_I"),
        batch_size=8,
        steps=4,
        log_every=1,
        checkpoint_every=2,
        ema_decays=(0.5,),
        data=DataConfig(size=8, threads=1),
        optimizer=OptimizerConfig(learning_rate=3e-2, warmup_steps=1),
        lora=LoraConfig(rank=2, alpha=4.0, targets="attention+conv1", text_encoder=True, dropout=0.25),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2, rules="fsdp_tp"),
        sample=SampleConfig(every=4, prompts=("a red cube",), steps="2"),
    )
    return dataclasses.replace(recipe, **changes)


def losses(workdir: Path) -> list[float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.slow  # a minute of a core
def test_factors_alone_are_trained_and_resume_to_the_same_bits(cascade: Path, tmp_path: Path) -> None:
    """On eight devices under fsdp_tp, with dropout and a sheet of samples; the frozen weights keep every bit."""
    frozen_trees = interrupted_runs.train_whole_and_in_parts(recipe_of(cascade), tmp_path)
    base = tiny.on_one_level(tiny.stages()[0])
    jax.tree.map(np.testing.assert_array_equal, frozen_trees[0]["unet"], base.unet_params)
    jax.tree.map(np.testing.assert_array_equal, frozen_trees[0]["text_encoder"], base.text_params)
    assert losses(tmp_path / "parts")[-2:] == losses(tmp_path / "whole")[-2:] and len(losses(tmp_path / "whole")) == 4
    step, metadata, ema = run.read_ema(str(tmp_path / "whole"))
    _, _, again = run.read_ema(str(tmp_path / "parts"))
    jax.tree.map(np.testing.assert_array_equal, ema, again)
    assert step == 4 and metadata["base_sha256"] and set(ema) == {"unet", "text_encoder"}
    paths = {jax.tree_util.keystr(path) for path, leaf in jax.tree.leaves_with_path(ema) if np.abs(leaf).max() > 0}
    assert len(paths) == len(jax.tree.leaves(ema)) and all("lora_" in path for path in paths)
    assert list((tmp_path / "whole" / "samples").rglob("*.png"))


@pytest.mark.slow  # two programs
def test_eight_devices_under_fsdp_tp_train_as_one(cascade: Path, tmp_path: Path) -> None:
    results = []
    spread = MeshConfig(data=2, fsdp=2, tensor=2, rules="fsdp_tp")
    for name, mesh, devices in (("one", MeshConfig(data=1), 1), ("eight", spread, 8)):
        with pytest.MonkeyPatch.context() as patch:
            own = partial(loop.meshes.make_mesh, devices=jax.devices()[:devices])
            patch.setattr(loop.meshes, "make_mesh", own)
            loop.train(recipe_of(cascade, mesh=mesh, sample=SampleConfig(every=0)), str(tmp_path / name))
        results.append(losses(tmp_path / name))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5)
    np.testing.assert_allclose(results[0], results[1], rtol=1e-3)


@pytest.mark.slow  # two programs
def test_int8_in_parts_with_kept_states_learns_what_the_encoder_and_whole_batches_do(
    cascade: Path, tmp_path: Path
) -> None:
    """Beside a base in int8: parts of a batch, recomputed blocks and kept text states change nothing but memory."""
    tars = record_stores.write_tars(tmp_path / "tars", 20, 7)
    data = DataConfig(source=str(tars), size=8, threads=1)
    factors = LoraConfig(rank=2, targets="attention+conv1", base_dtype="int8")
    quiet = {"sample": SampleConfig(every=0), "lora": factors, "mesh": MeshConfig(), "compute_dtype": "bfloat16"}
    plain = recipe_of(cascade, data=data, batch_size=16, **quiet)
    text = Encoders(release.read_text_encoder(plain.text_encoder_from))
    kept, stored = tmp_path / "kept", sources.open_stored(str(tars))
    spec: dict[str, Any] = {"form": "exact", "preparation": data.preparation, "batch_size": 8}
    embed.embed(stored, text, kept, mesh=embed.host_mesh(), sharding_rules=rules.PRESETS["dp"], **spec)
    saving = dataclasses.replace(
        plain, accumulate=2, remat="blocks", data=dataclasses.replace(data, embeddings=str(kept))
    )
    results = []
    for name, recipe in (("plain", plain), ("saving", saving)):
        loop.train(recipe, str(tmp_path / name))
        results.append(losses(tmp_path / name))
    assert len(results[0]) == 4 and results[0][0] != results[0][-1]
    np.testing.assert_allclose(*results, rtol=2e-3)


def test_a_run_is_published_as_a_file_and_as_a_release(cascade: Path, tmp_path: Path) -> None:
    """The release holds the base with the factors in it, and the file the factors as they are."""
    recipe, workdir, baked, file = recipe_of(cascade), tmp_path / "run", tmp_path / "release", tmp_path / "style"
    rng, ema = np.random.default_rng(0), {}
    for name, config, targets in (
        ("unet", NETS["tiny-I"], recipe.lora.targets),
        ("text_encoder", tiny.TEXT, lora.TEXT_TARGETS),
    ):
        abstract = jax.eval_shape(partial(lora.init_factors, boxed_params(config), targets, 2), jax.random.key(0))
        random = lambda leaf: rng.normal(size=leaf.shape).astype(np.float32)  # noqa: E731
        ema[name] = jax.tree.map(random, nn.unbox(abstract))
    text = release.read_text_encoder(cascade)
    metadata = {"recipe": recipe_to_dict(recipe), "text_encoder_sha256": text.sha256}
    metadata["base_sha256"] = warm_start.open_base(recipe)[1]
    with run.open_checkpoints(str(workdir), metadata, keep=1) as saved:
        saved.save(2, {"ema": {"0.5": jax.tree.map(jnp.asarray, ema)}})
    publish.publish([str(workdir)], str(baked))
    publish.publish_lora(str(workdir), str(file))
    opened = lora_files.open_lora(file)
    fitted = lora_files.fit(opened, "text_encoder", tiny.TEXT)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, fitted.factors), ema["text_encoder"])
    assert opened.settings["stage"] == "base" and set(fitted.scales.values()) == {recipe.lora.scale}
    merged = lora_files.with_loras([release.read_stage(recipe.init_from, None)], {file: 1.0})[0]
    stage = release.read_stage(baked / "stage_I")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b)), stage.unet_params, merged.unet_params)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b)), stage.text_params, merged.text_params)
    assert stage.text_encoder_sha256 != text.sha256
    with pytest.raises(ValueError, match="exists already"):
        publish.publish_lora(str(workdir), str(file))


def test_another_base_is_refused(cascade: Path, tmp_path: Path) -> None:
    recipe = recipe_of(cascade, sample=SampleConfig(every=0))
    _, identity = warm_start.open_base(recipe)
    assert warm_start.open_base(recipe)[1] == identity
    other = dataclasses.replace(
        tiny.on_one_level(tiny.stages()[0]), unet_params=tiny.random_params(NETS["tiny-I"], seed=3)
    )
    release.write_stage(tmp_path / "other", other)
    assert warm_start.open_base(dataclasses.replace(recipe, init_from=str(tmp_path / "other")))[1] != identity
    with pytest.raises(ValueError, match=r"has shape \(64,\) there, \(128,\) here; name the release of this net"):
        wider = dataclasses.replace(NETS["tiny-I"], block_out_channels=(32,))
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(presets.UNETS, "tiny-I", wider)
            warm_start.open_base(recipe)


def test_the_state_of_a_lora_is_small(cascade: Path) -> None:
    """IF-I-XL: parameters, EMA and moments of a rank-16 LoRA take less than 2 % of those of the whole net."""
    mesh = jax.sharding.AbstractMesh((1, 1, 1), ("data", "fsdp", "tensor"))
    whole = Recipe(unet="IF-I-XL", text_encoder_from="t5-v1_1-xxl", compute_dtype="bfloat16")
    factors = dataclasses.replace(whole, init_from="IF-I-XL-v1.0", lora=LoraConfig(rank=16))
    text = presets.T5_ENCODERS["t5-v1_1-xxl"]
    sizes = [memory.step_bytes(recipe, text, mesh, activations=False) for recipe in (whole, factors)]
    state = [sum(row[kind] for kind in ("parameters", "EMA", "moments")) for row in sizes]
    assert state[1] < 0.02 * state[0]
    assert sizes[1]["frozen UNet"] == sizes[0]["parameters"] // 2  # bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora.alpha": 8.0}, r"lora\.alpha is 8\.0 without lora\.rank"),
        ({"lora.rank": -1}, r"lora\.rank is -1: it must be at least 0"),
        ({"lora.rank": 17}, r"lora\.rank is 17: .*/add_k_proj is only 16 wide: use a rank of at most 16"),
        ({"lora.rank": 2, "lora.targets": "to_qq"}, r"lora\.targets is 'to_qq': no layer .* near it are to_q"),
        ({"lora.rank": 2, "lora.targets": ""}, r"lora\.targets is '': no layer of the net is called ''"),
        ({"lora.rank": 2, "init_from": ""}, r"init_from is empty, with lora\.rank 2"),
        ({"lora.rank": 2, "text_encoder_from": ""}, r"text_encoder_from is empty, with lora\.rank 2"),
        ({"lora.rank": 2, "init_only": "mid"}, r"init_only is 'mid': a LoRA keeps all weights"),
        ({"lora.rank": 2, "lora.text_encoder": True, "data.embeddings": "kept"}, r"data\.embeddings is 'kept' with"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    keys: dict[str, Any] = {"unet": "tiny-I", "text_encoder": "tiny", "init_from": "x", "text_encoder_from": "x"}
    keys["data"] = {"size": 8}
    for name, value in changes.items():
        section, _, key = name.rpartition(".")
        if section:
            keys.setdefault(section, {})[key] = value
        else:
            keys[key] = value
    with pytest.raises(ValueError, match=message) as error:
        to_recipe(keys)
    assert "\n" not in str(error.value)
