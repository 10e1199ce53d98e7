"""Odd machines: no home, no login, no reader, no UTF-8; and options by stage."""

from __future__ import annotations

import io
import sys
import warnings
from pathlib import Path

import click
import jax
import pytest
from PIL import Image, PngImagePlugin

from if_jax import cli_errors
from if_jax.checkpoints.files import user_cache, write_json
from if_jax.cli_options import stage_words
from if_jax.data.preprocessing import read_picture
from if_jax.evaluation.draw_prompts import claim_folder
from if_jax.inference.pictures import read_notes
from if_jax.text.captions import clean_caption

NO_OPTIONS = {"guidance": (), "steps": (), "sampler": (), "noise_level": (), "words": ()}


def _homeless():
    raise RuntimeError("Could not determine home directory.")


def test_without_a_home_nothing_is_cached_and_nothing_stops(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", _homeless)
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        assert user_cache() is None
        cli_errors.cache_compilations()
        monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/home")
        cli_errors.cache_compilations()
        assert jax.config.values["jax_compilation_cache_dir"] is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_login_is_asked_for_before_any_work(monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ValueError, match=r"--wandb 'p': nobody is logged in .*WANDB_MODE=offline"):
        cli_errors.check_wandb_login("p", "--wandb")
    cli_errors.check_wandb_login("", "--wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    cli_errors.check_wandb_login("p", "--wandb")
    wandb.teardown()  # it remembers for later tests that it was asked to be online


def test_a_reader_that_has_read_enough_hears_nothing(monkeypatch):
    class Gone(io.StringIO):
        def flush(self):
            raise BrokenPipeError(32, "Broken pipe")

    @cli_errors.plain_errors
    def command():
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(click.ClickException):  # another pipe than ours: a worker's, say
        command()
    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(BrokenPipeError):  # which click takes for what it is
        command()


def test_signs_that_the_terminal_lacks_end_nothing(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    cli_errors.plain_errors(lambda: print("α … ✓", flush=True))()
    assert written.getvalue() == b"? ? ?\n"


def test_the_home_folder_is_known_where_a_shell_leaves_its_sign(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = []

    @click.group(cls=cli_errors.Commands)
    def group():
        pass

    @group.command(context_settings={"ignore_unknown_options": True})
    @click.argument("words", nargs=-1, type=click.UNPROCESSED)
    def see(words):
        seen.extend(words)

    words = ["~/a", "--out=~/a", "--config.data.source=~", "a ~/b", "~ 3 cubes", "--out=b~/c"]
    group(["see", *words], standalone_mode=False)
    assert seen == [f"{tmp_path}/a", f"--out={tmp_path}/a", f"--config.data.source={tmp_path}", *words[3:]]


def test_options_in_turn_speak_of_the_stages_that_are_drawn():
    words = stage_words({**NO_OPTIONS, "steps": ("7",), "noise_level": (3, 4)}, ("II", "III"))
    assert words == {"II": {"sample_timestep_respacing": "7", "noise_level": 3}, "III": {"noise_level": 4}}
    words = stage_words({**NO_OPTIONS, "noise_level": (3,)}, ("I", "II"))
    assert words == {"I": {}, "II": {"noise_level": 3}}


def test_pictures_of_somebody_else_are_never_replaced_by_an_evaluation(tmp_path):
    folder, own = tmp_path / "pictures", {"cascade_sha256": "a", "prompts_sha256": "b"}
    folder.mkdir()
    photo = folder / "2024-holiday.png"
    photo.write_bytes(b"photo")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"2024-holiday.png exists and is not of an evaluation"):
            claim_folder(folder, own, overwrite)
    photo.unlink()
    write_json(tmp_path / "report.json", {"title": "mine"})
    with pytest.raises(ValueError, match=r"report.json exists and is not of an evaluation"):
        claim_folder(folder, own)
    (tmp_path / "report.json").unlink()
    claim_folder(folder, own)
    names = ("0001-I.png", "2024-holiday.png")
    for name in names:
        (folder / name).write_bytes(b"picture")
    claim_folder(folder, own | {"cascade_sha256": "c"}, overwrite=True)
    assert [(folder / name).exists() for name in names] == [False, True]


def test_foreign_pictures_have_no_settings(tmp_path):
    for number, info in enumerate((None, "[1]", "no JSON")):
        path, about = tmp_path / f"{number}.png", PngImagePlugin.PngInfo()
        if info:
            about.add_itxt("if_jax", info)
        Image.new("RGB", (8, 8)).save(path, pnginfo=about)
        with pytest.raises(ValueError, match="holds no settings of if-jax"):
            read_notes(path)


def test_threads_never_touch_the_filters_of_warnings(monkeypatch):
    encoded = io.BytesIO()
    Image.new("RGB", (8, 8)).save(encoded, "PNG")
    monkeypatch.setattr(warnings, "catch_warnings", lambda *_, **__: pytest.fail("not for threads"))
    assert clean_caption("photo.jpg of a <b>cube</b>") and read_picture(encoded.getvalue()).size == (8, 8)
