"""Training of new words: their rows alone are trained, it resumes, what comes of it draws alike, what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import record_stores
import tiny

from if_jax.checkpoints import release, run, words
from if_jax.config import (
    DataConfig,
    MeshConfig,
    NewWordsConfig,
    OptimizerConfig,
    Recipe,
    SampleConfig,
    recipe_to_dict,
    to_recipe,
)
from if_jax.training import executable_cache, loop, publish, setup, warm_start

WORDS = ("sks-toy", "zwx")
NET = tiny.one_level(tiny.BASE)


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
        data=DataConfig(size=8, threads=1, caption_dropout=0.0),
        optimizer=OptimizerConfig(learning_rate=3e-2, warmup_steps=1),
        new_words=NewWordsConfig(WORDS, "cube"),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2, rules="fsdp_tp"),
        sample=SampleConfig(every=0),
    )
    return dataclasses.replace(recipe, **changes)


@pytest.mark.slow  # half a minute of a core
def test_rows_alone_are_trained_and_resume_to_the_same_bits(
    cascade: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On eight devices under fsdp_tp; gradients, moments and EMA are of the rows, the frozen weights keep every bit."""
    record_stores.write_folder(tmp_path / "pictures", 8)
    for number, caption in enumerate(sorted((tmp_path / "pictures").glob("*.txt"))):
        caption.write_text(f"a {WORDS[0]} cube {number}")  # the other word occurs in no caption
    frozen_trees, programs, states = [], [], []
    place_frozen, compile_step = setup.place_frozen, executable_cache.compiled

    def keep_frozen(*args: Any) -> Any:
        frozen_trees.append(place_frozen(*args))
        return frozen_trees[-1]

    def stops_before(last: int, *args: Any) -> Any:  # the three sessions run the same step
        programs.append(programs[0] if programs else compile_step(*args))

        def step(state: Any, frozen: Any, batch: Any) -> Any:
            if int(state.step) == last:
                raise KeyboardInterrupt
            states.append(jax.tree.map(np.asarray, state))
            return programs[0](state, frozen, batch)

        return step

    monkeypatch.setattr(setup, "place_frozen", keep_frozen)
    recipe = recipe_of(cascade)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, source=str(tmp_path / "pictures")))
    for name, last in (("whole", 9), ("parts", 3), ("parts", 9)):
        monkeypatch.setattr(executable_cache, "compiled", lambda *args, last=last: stops_before(last, *args))
        if name == "parts" and last == 3:
            with pytest.raises(KeyboardInterrupt):
                loop.train(recipe, str(tmp_path / name))
        else:
            loop.train(recipe, str(tmp_path / name))
    base = tiny.on_one_level(tiny.stages()[0])
    assert base.text_params is not None
    jax.tree.map(np.testing.assert_array_equal, frozen_trees[0]["unet"], base.unet_params)
    table = np.asarray(base.text_params["shared"]["embedding"])
    np.testing.assert_array_equal(frozen_trees[0]["text_encoder"]["shared"]["embedding"][:384], table)
    encoder = "encoder"
    jax.tree.map(np.testing.assert_array_equal, frozen_trees[0]["text_encoder"][encoder], base.text_params[encoder])
    first = states[0]
    start = table[[3 + byte for byte in b"cube"]].mean(0)
    np.testing.assert_allclose(jax.tree.leaves(first.params)[0], [start, start], rtol=1e-6)
    sizes = {leaf.shape for leaf in jax.tree.leaves((first.params, first.ema, first.opt_state))}
    assert sizes <= {(2, 32), ()}
    _, metadata, ema = run.read_ema(str(tmp_path / "whole"))
    _, _, again = run.read_ema(str(tmp_path / "parts"))
    jax.tree.map(np.testing.assert_array_equal, ema, again)
    rows = ema["text_encoder"]["shared"]["embedding"]
    assert metadata["base_sha256"] and np.abs(rows[0] - start).max() > 1e-3
    np.testing.assert_allclose(rows[1], start, rtol=1e-6)  # what no caption holds has no gradient


def test_a_run_is_published_as_a_file_and_as_a_release(cascade: Path, tmp_path: Path) -> None:
    """A release with the words in its encoder, or a file of them: the same encoder, and the net as it was."""
    recipe, workdir = recipe_of(cascade), tmp_path / "run"
    rows = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
    text = release.read_text_encoder(cascade)
    metadata = {"recipe": recipe_to_dict(recipe), "text_encoder_sha256": text.sha256}
    metadata["base_sha256"] = warm_start.open_base(recipe)[1]
    with run.open_checkpoints(str(workdir), metadata, keep=1) as saved:
        saved.save(2, {"ema": {"0.5": {"text_encoder": {"shared": {"embedding": jnp.asarray(rows)}}}}})
    publish.publish([str(workdir)], str(tmp_path / "release"))
    file = publish.publish_words(str(workdir), str(tmp_path / "word"))
    assert file == tmp_path / "word/learned_embeds.safetensors" and list(words.read_words(file)) == list(WORDS)
    stage = release.read_stage(tmp_path / "release/stage_I")
    joined = words.with_word_files([release.read_stage(cascade / "stage_I")], [file])[0]
    for name in ("unet_params", "text_params"):
        pair = (getattr(stage, name), getattr(joined, name))
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b)), *pair)
    assert stage.tokenizer == joined.tokenizer and stage.text_encoder_sha256 != text.sha256
    with pytest.raises(ValueError, match="exists already"):
        publish.publish_words(str(workdir), str(tmp_path / "word"))
    with pytest.raises(ValueError, match="has trained all weights, not a LoRA"):
        publish.publish_lora(str(workdir), str(tmp_path / "lora"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": ""}, r"init_from is empty, with new_words\.tokens \('zwx',\)"),
        ({"text_encoder_from": ""}, r"text_encoder_from is empty, with new_words\.tokens"),
        ({"init_only": "mid"}, r"init_only is 'mid': new words keep all weights"),
        ({"lora.rank": 2}, r"lora\.rank is 2 with new_words\.tokens: train one after the other"),
        ({"data.embeddings": "kept"}, r"data\.embeddings is 'kept' with new_words\.tokens"),
        ({"stage": "super-resolution", "unet": "demo-II"}, "a super-resolution stage brings no text encoder"),
        ({"new_words.tokens": (), "new_words.init": "cube"}, r"new_words\.init is 'cube' without new_words\.tokens"),
        ({"new_words.tokens": ("<sks>",)}, r"holds '<sks>', which the cleaning of captions makes ''"),
        ({"new_words.tokens": ("SKS",)}, r"holds 'SKS', which the cleaning of captions makes 'sks'"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    keys: dict[str, Any] = {"unet": "tiny-I", "text_encoder": "tiny", "init_from": "x", "text_encoder_from": "x"}
    keys |= {"data": {"size": 8}, "new_words": {"tokens": ("zwx",)}}
    for name, value in changes.items():
        section, _, key = name.rpartition(".")
        if section:
            keys.setdefault(section, {})[key] = value
        else:
            keys[key] = value
    if keys.get("stage"):
        keys["data"] = {"size": 256}
    with pytest.raises(ValueError, match=message) as error:
        to_recipe(keys)
    assert "\n" not in str(error.value)


def test_a_token_that_the_encoder_knows_is_refused(cascade: Path) -> None:
    recipe = recipe_of(cascade, new_words=NewWordsConfig(("x",)))
    with pytest.raises(ValueError, match=r"new_words\.tokens: new word 'x' is a token that T5 already knows \(id 123"):
        setup.read_frozen(recipe)
