"""The command line: what it writes, and that every mistake ends in one line, a non-zero exit and nothing written."""

from __future__ import annotations

import json

import click
import flax.linen as nn
import jax
import numpy as np
import pytest
import record_stores
import tiny
from click.testing import CliRunner
from PIL import Image

from if_jax import Cascade
from if_jax.checkpoints.convert import LAYOUTS
from if_jax.checkpoints.lora import write_lora
from if_jax.checkpoints.release import write_cascade
from if_jax.checkpoints.tensors import DTYPES
from if_jax.checkpoints.weights import boxed_params
from if_jax.checkpoints.words import write_words
from if_jax.cli import main
from if_jax.data import embeddings
from if_jax.models.lora import init_factors


def _commands(group=main, prefix=""):
    """The words of every command and group, below `if-jax`."""
    for name, command in group.commands.items():
        yield prefix + name
        if isinstance(command, click.Group):
            yield from _commands(command, f"{prefix}{name} ")


COMMANDS = tuple(_commands())


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release") / "tiny"
    write_cascade(folder, [tiny.on_one_level(stage) for stage in tiny.stages()], tiny.DEFAULTS)
    return folder


@pytest.fixture(autouse=True)
def no_lasting_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _run(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


def _size(path):
    with Image.open(path) as picture:
        return picture.size


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_by_an_example(command):
    result = _run(*command.split(), "--help")
    assert result.exit_code == 0
    assert command == "data" or "Example:  if-jax" in result.output


def test_options_offer_what_the_layers_below_know():
    """Their tables are written out in the command line, which must not import JAX to print a help text."""
    choices = {
        f"{name} {option.name}": list(option.type.choices)
        for name in ("export", "convert", "embed")
        for option in main.commands[name].params
        if isinstance(option.type, click.Choice)
    }
    assert {words: set(known) for words, known in choices.items()} == {
        "export dtype": set(DTYPES),
        "convert dtype": set(DTYPES),
        "convert layout": set(LAYOUTS),
        "embed form": set(embeddings.FORMS),
    }


def test_dream_writes_pictures_and_keeps_existing_ones(cascade, tmp_path):
    out = tmp_path / "out"
    result = _run("dream", "a", "b", "--cascade", cascade, "--out", out, "--steps", "2", "--steps", "1")
    assert result.exit_code == 0, result.output
    names = {"0000-I.png", "0001-I.png", "0000-II.png", "0001-II.png", "grid-I.png", "grid-II.png"}
    assert {path.name for path in out.iterdir()} == names
    assert _size(out / "0001-II.png") == (16, 16)
    Image.new("RGB", (1, 1)).save(out / "0000-I.png")
    again = _run("dream", "a", "b", "--cascade", cascade, "--out", out, "--steps", "2", "--steps", "1")
    assert "6 kept" in again.output
    over = _run("dream", "a", "b", "--cascade", cascade, "--out", out, "--steps", "2", "--steps", "1", "--overwrite")
    assert "5 pictures written" in over.output and "1 kept" in over.output  # not a picture of somebody else
    assert _size(out / "0000-I.png") == (1, 1)


def test_inspect_prints_what_is_usable_first_and_draws_a_sheet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record_stores.write_folder(tmp_path / "mine", 3)
    (tmp_path / "mine" / "bad.png").write_bytes(b"")
    result = _run("data", "inspect", "mine")
    assert result.exit_code == 0 and result.output.startswith("usable 3 of 4 records in mine"), result.output
    assert "skipped 1: no caption (bad.png)" in result.output and "samples on mine-sheet.png" in result.output
    assert _size(tmp_path / "mine-sheet.png") == (3 * 172, 224)
    assert "is kept" in _run("data", "inspect", "mine").output
    assert "samples on mine-sheet.png" in _run("data", "inspect", "mine", "--overwrite").output
    Image.new("RGB", (1, 1)).save("mine-sheet.png")
    assert "is kept" in _run("data", "inspect", "mine", "--overwrite").output and _size("mine-sheet.png") == (1, 1)


def _bytes(path):
    with Image.open(path) as picture:
        return picture.tobytes()


def test_a_picture_repeats_itself_and_states_replace_prompts(cascade, tmp_path):
    """The settings in the PNG draw it again, alone; text states in a file draw what their prompts draw."""
    settings = ["--cascade", cascade, "--steps", "3", "--set", "I.guidance_scale=2.5", "--negative-prompt", "dull"]
    result = _run(
        "dream", "a", "b", *settings, "--seed", 5, "--aspect-ratio", "2:1", "--stages", 1, "--out", tmp_path / "one"
    )
    assert result.exit_code == 0, result.output
    again = _run("dream", "--like", tmp_path / "one/0001-I.png", "--out", tmp_path / "two")
    assert again.exit_code == 0, again.output
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"0001-I.png", "grid-I.png"}
    assert _size(tmp_path / "two/0001-I.png") == (16, 8)
    assert _bytes(tmp_path / "one/0001-I.png") == _bytes(tmp_path / "two/0001-I.png")

    plain = ["--cascade", cascade, "--stages", 1]
    assert _run("dream", "a", "b", *plain, "--out", tmp_path / "three").exit_code == 0
    saved = _run("dream", "a", "b", *plain, "--save-embeds", tmp_path / "states.safetensors")
    assert "text states of 2 prompts" in saved.output, saved.output
    result = _run("dream", "--embeds", tmp_path / "states.safetensors", *plain, "--out", tmp_path / "four")
    assert result.exit_code == 0, result.output
    assert _bytes(tmp_path / "three/0001-I.png") == _bytes(tmp_path / "four/0001-I.png")


def test_a_lora_is_drawn_with_repeated_and_baked_in(cascade, tmp_path):
    """By the command line, by Python and merged into a release: the same pictures, which are not those without it."""
    stage = tiny.on_one_level(tiny.stages()[0])
    boxed, key = boxed_params(stage.unet_config), jax.random.key(0)
    factors = jax.jit(lambda: nn.unbox(init_factors(boxed, "attention+conv", 3, key)))()
    factors = jax.tree.map(lambda leaf: leaf + 0.2, factors)
    write_lora(tmp_path / "style/pytorch_lora_weights.safetensors", {"unet": factors}, 3, notes={"stage": "base"})
    shared = ["dream", "a", "--stages", 1]
    assert _run(*shared, "--cascade", cascade, "--out", tmp_path / "without").exit_code == 0
    drawn = _run(*shared, "--cascade", cascade, "--lora", f"{tmp_path / 'style'}:0.5", "--out", tmp_path / "with")
    assert drawn.exit_code == 0, drawn.output
    again = _run("dream", "--like", tmp_path / "with/0000-I.png", "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    merged = _run("convert", cascade, tmp_path / "merged", "--merge", f"{tmp_path / 'style'}:0.5")
    assert merged.exit_code == 0, merged.output
    assert _run(*shared, "--cascade", tmp_path / "merged", "--out", tmp_path / "baked").exit_code == 0
    python = Cascade.load(cascade, stages=1, lora={tmp_path / "style": 0.5}).dream("a")["I"][0]
    pictures = [_bytes(tmp_path / name / "0000-I.png") for name in ("without", "with", "again", "baked")]
    assert pictures[0] != pictures[1] == pictures[2] == pictures[3] == python.tobytes()


def test_new_words_are_drawn_with_repeated_and_kept_in_a_release(cascade, tmp_path):
    """By the command line, by Python and out of a release that holds them: the same pictures."""
    write_words(tmp_path / "word/learned_embeds.safetensors", {"sks-toy": np.full(32, 3.0)})
    shared = ["dream", "a sks-toy", "--stages", 1]
    assert _run(*shared, "--cascade", cascade, "--out", tmp_path / "without").exit_code == 0
    drawn = _run(*shared, "--cascade", cascade, "--new-words", tmp_path / "word", "--out", tmp_path / "with")
    assert drawn.exit_code == 0, drawn.output
    again = _run("dream", "--like", tmp_path / "with/0000-I.png", "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    converted = _run("convert", cascade, tmp_path / "converted", "--new-words", tmp_path / "word")
    assert converted.exit_code == 0, converted.output
    assert _run(*shared, "--cascade", tmp_path / "converted", "--out", tmp_path / "kept").exit_code == 0
    python = Cascade.load(cascade, stages=1, new_words=[tmp_path / "word"]).dream("a sks-toy")["I"][0]
    pictures = [_bytes(tmp_path / name / "0000-I.png") for name in ("without", "with", "again", "kept")]
    assert pictures[0] != pictures[1] == pictures[2] == pictures[3] == python.tobytes()


def test_pictures_are_drawn_over_enlarged_and_repaired(cascade, tmp_path):
    picture, mask = tmp_path / "picture.png", tmp_path / "mask.png"
    Image.effect_noise((16, 16), 90).convert("RGB").save(picture)
    half = Image.new("L", (16, 16))
    half.paste(255, (0, 0, 8, 16))
    half.save(mask)
    shared = ["--cascade", cascade, "--steps", "3"]
    for command, more, names in (
        ("style-transfer", ["a toy"], {"0000-I.png", "0000-II.png", "grid-I.png", "grid-II.png"}),
        ("super-resolution", [], {"0000-II.png", "grid-II.png"}),
        ("inpaint", [mask, "a cube", "a ball", "--stages", "1"], {"0000-I.png", "0001-I.png", "grid-I.png"}),
    ):
        out = tmp_path / command
        result = _run(command, picture, *more, *shared, "--out", out, "--watermark")
        assert result.exit_code == 0, result.output
        assert {path.name for path in out.iterdir()} == names
    refused = _run("dream", "--like", tmp_path / "inpaint/0000-I.png")
    assert refused.exit_code == 1 and "drawn by inpainting over another picture" in refused.output


def test_wandb_keeps_a_table_offline(cascade, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    result = _run("dream", "a", "--cascade", cascade, "--stages", 1, "--out", tmp_path / "out", "--wandb", "pictures")
    assert result.exit_code == 0, result.output
    (table,) = tmp_path.rglob("*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["prompt", "seed", "settings", "I"]
    ((prompt, seed, settings, _),) = content["data"]
    assert (prompt, seed, json.loads(settings)["mode"]) == ("a", 0, "dream")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["dream", "a", "--cascade", "nowhere"], "nowhere: no such folder"),
        (["dream", "a", "--cascade", "TINY", "--stages", "3"], "stages is 3"),
        (["dream", "a", "--cascade", "TINY", "--steps", "fast"], "'fast'"),
        (["dream", "a", "--cascade", "TINY", "--steps", "2", "--steps", "2", "--steps", "2"], "given 3 times"),
        (["dream", "--cascade", "TINY"], "give either PROMPTS, or --embeds, or --like"),
        (["dream", "a", "--like", "b.png"], "give either PROMPTS"),
        (["dream", "--like", "gone.png"], "gone.png: no such file"),
        (["dream", "--like", "gone.png", "--seed", "3"], "--seed would do nothing: --like"),
        (["dream", "a", "--save-embeds", "x", "--steps", "3"], "--steps would do nothing: --save-embeds"),
        (["dream", "--embeds", "gone", "--text-int8"], "--text-int8 would do nothing: with --embeds"),
        (["dream", "a", "--stages", "1", "--steps", "2", "--steps", "2"], "--steps is given 2 times: 1 stages"),
        (["dream", "a", "--stages", "1", "--noise-level", "9"], "--noise-level is given 1 times: 0 stages"),
        (["dream", "a", "--cascade", "TINY", "--set", "III.eta=1"], "--set 'III.eta=1': stage III is not drawn"),
        (["super-resolution", "x.png", "--set", "I.eta=0.5"], "--set 'I.eta=0.5': stage I is not drawn"),
        (["evaluate", "--steps", "2", "--steps", "2", "--steps", "2"], "--steps is given 3 times: 2 stages"),
        (["data", "build", "folder", "--source", "gone", "--count", "3"], "--count would do nothing"),
        (["data", "build", "scenes", "--source", "gone"], "--source would do nothing"),
        (["export", "W", "release", "--noise-level", "3"], "noise_level is given 1 times"),
        (["export", "W", "release", "--steps", "3", "--steps", "3"], "steps is given 2 times for 1 run"),
        (["train", "--config", "CONFIG", "--workdir", "W", "--config.steps=1e5"], "write 100000"),
        (["train", "--config", "CONFIG", "--workdir", "W", "--config.optimizer=adam"], "optimizer.name"),
        (["dream", "--embeds", "gone", "--cascade", "TINY"], "gone: no such file"),
        (["dream", "a", "--cascade", "TINY", "--set", "I.eta"], "write STAGE.WORD=VALUE"),
        (["dream", "a", "--cascade", "TINY", "--set", "I.width=3"], "if_I_kwargs has no 'width'"),
        (["dream", "a", "--cascade", "TINY", "--sampler", "euler"], "sample_loop 'euler' is unknown"),
        (["dream", "a", "--cascade", "TINY", "--aspect-ratio", "0:3"], "aspect_ratio is '0:3'"),
        (["dream", "a", "--cascade", "TINY", "--out", "/dev/null/pictures"], "cannot write there"),
        (["dream", "a", "--cascade", "TINY", "--batch-size", "0"], "batch_size is 0"),
        (["style-transfer", "gone.png", "a", "--cascade", "TINY"], "gone.png: no such file"),
        (["style-transfer", "gone.png", "--cascade", "TINY"], "give PROMPTS, or --style-prompt"),
        (["super-resolution", "CONFIG", "--cascade", "TINY"], "no picture that Pillow can read"),
        (["inpaint", "gone.png", "gone.png", "a", "--cascade", "TINY"], "gone.png: no such file"),
        (["train", "--config", "nothing.py", "--workdir", "W"], "recipe 'nothing.py' does not exist"),
        (["train", "--config", "CONFIG:smok", "--workdir", "W"], "recipe form 'smok' is unknown for demo-I"),
        (["train", "--config", "CONFIG", "--workdir", "W", "--config.bacth=3"], "bacth"),
        (["train", "--config", "CONFIG", "--workdir", "W", "--config.batch_size=x"], "batch_size"),
        (["train", "--config", "CONFIG", "--workdir", "W", "--config.stage=bse"], "stage is 'bse'"),
        (["train", "--config", "CONFIG", "--workdir", "W", "--confg.stage=base"], "confg"),
        (["train", "--config", "CONFIG", "--workdir", "W", "--config.data.source=gone"], "'gone' does not exist"),
        (["export", "W", "release"], "no checkpoint under W"),
        (["export", "W", "--lora", "L"], "no checkpoint under W"),
        (["export", "W", "V", "--lora", "L"], "--lora writes the factors of one run, but 2 folders"),
        (["export", "W", "--lora", "L", "--steps", "3"], "--steps would do nothing: --lora"),
        (["export", "W"], "Missing argument 'CASCADE'"),
        (["dream", "a", "--cascade", "TINY", "--lora", "gone"], "gone: no such file; give a LoRA file"),
        (["dream", "a", "--cascade", "TINY", "--lora", "gone:x"], "--lora gone:x: 'x' is no weight"),
        (["dream", "a", "--cascade", "TINY", "--lora", "gone", "--lora", "gone:2"], "--lora gone is given twice"),
        (["dream", "--like", "gone.png", "--lora", "gone"], "--lora would do nothing: --like"),
        (["export", "W", "--new-words", "L"], "no checkpoint under W"),
        (["export", "W", "V", "--new-words", "L"], "--new-words writes the words of one run, but 2 folders"),
        (["export", "W", "--new-words", "L", "--dtype", "float16"], "--dtype would do nothing: --new-words"),
        (["export", "W", "--lora", "L", "--new-words", "L"], "--new-words would do nothing: --lora"),
        (["dream", "a", "--cascade", "TINY", "--new-words", "gone"], "gone: no such file; give a file of new words"),
        (["convert", "TINY", "with", "--new-words", "gone"], "gone: no such file; give a file of new words"),
        (["convert", "TINY", "merged", "--merge", "gone"], "gone: no such file; give a LoRA file"),
        (["train", "--config", "CONFIG", "--workdir", "W", "--config.lora.alpha=2"], "lora.alpha is 2.0 without"),
        (["data", "build", "folder", "--source", "gone", "--out", "built"], "gone"),
        (["data", "inspect", "gone"], "'gone' does not exist"),
        (["data", "inspect", "gone", "--samples", "0"], "--samples 0"),
        (["embed", "--config", "CONFIG"], "text_encoder_from is empty"),
        (["doctor", "--config.batch_size=3"], "unexpected argument '--config.batch_size=3'"),
        (["doctor", "--process", "1"], "give all three, or none"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(args, message, cascade, tmp_path, monkeypatch):
    config = tmp_path / "recipe.py"
    config.write_text(
        "from if_jax.recipes import default_recipe, in_form\n\n\n"
        "def get_config(form=''):\n    return in_form(default_recipe(), form)\n"
    )
    names = {"TINY": str(cascade), "CONFIG": str(config), "CONFIG:smok": f"{config}:smok"}
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    result = _run(*(names.get(arg, arg) for arg in args))
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit), result.exception
    last = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert len(last) == 1 and message in last[0], result.output
    assert not list(work.rglob("*"))
