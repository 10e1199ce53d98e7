"""A run watched: each checkpoint that appears is scored, to the run's writer, until the run ends."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from PIL import Image

from if_jax import cli
from if_jax.checkpoints import run
from if_jax.config import DataConfig, Recipe, SampleConfig, recipe_to_dict
from if_jax.evaluation import run_scores
from if_jax.evaluation.captioned import CaptionedSuite
from if_jax.parallel import run_lock

RECIPE = Recipe(
    unet="tiny-I",
    text_encoder="tiny",
    steps=4,
    log_every=1,
    checkpoint_every=2,
    ema_decays=(0.9,),
    data=DataConfig(size=8),
    sample=SampleConfig(steps="2"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    (folder / "captions.txt").write_text("a red cube\na blue ball\na green cone\na white cube\n")
    (folder / "true").mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / "true" / f"{i}.png")
    with tiny.as_presets():
        yield folder


def _save(workdir, step, recipe=RECIPE):
    """A checkpoint, as training leaves it."""
    weights = {
        "unet": tiny.random_params(tiny.one_level(tiny.BASE), step),
        "text_encoder": tiny.random_params(tiny.TEXT),
    }
    metadata = {"recipe": recipe_to_dict(recipe), "text_encoder_sha256": ""}
    with run.open_checkpoints(str(workdir), metadata, keep=2) as checkpoints:
        checkpoints.save(step, {"step": jnp.asarray(step), "ema": {"0.9": weights}})


def _suite(place):
    return CaptionedSuite(place / "captions.txt", place / "true")


def test_checkpoints_are_scored_as_they_appear_until_the_run_ends(place, tmp_path):
    workdir, out, lines = tmp_path / "run", tmp_path / "out", []

    def say(line):
        lines.append(line)
        if line == "step 2":
            _save(workdir, 4)  # the run goes on while it is scored

    _save(workdir, 2)
    (workdir / "metrics.jsonl").write_text('{"step": 4, "loss": 1.0}\n')
    with run_lock.locked(str(workdir)):
        scored = run_scores.watch(str(workdir), _suite(place), out, say=say, poll_seconds=0.01)
    assert [step for step, _ in scored] == [2, 4] and lines[-1].endswith("is trained to its end, at step 4")
    rows = [json.loads(line) for line in (workdir / "evaluation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    name = "evaluation/reader/kernel_distance"
    assert rows[0][name] == scored[0][1]["measures"]["reader"]["kernel_distance"]["value"] != rows[1][name]
    assert (workdir / "metrics.jsonl").read_text() == '{"step": 4, "loss": 1.0}\n'  # training's own lines stay
    assert any(path.name.endswith(".evaluation") for path in (workdir / "tensorboard").iterdir())
    assert not (out / "cascade").exists() and (out / "step-4/report.json").exists()
    lines.clear()  # again: all is scored
    assert run_scores.watch(str(workdir), _suite(place), out, say=lines.append) == [] and len(lines) == 1


def test_a_run_that_was_stopped_ends_the_watch_and_steps_between_are_left_out(place, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    _save(workdir, 2)
    scored = []

    def score(workdir, *rest):
        scored.append(run.read_latest(workdir)[0])
        return scored[-1], {"measures": {}}

    monkeypatch.setattr(run_scores, "_score", score)
    words = ["evaluate", "--suite", "coco", "--captions", str(place / "captions.txt"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.main, [*words, "--watch", str(workdir), "--watch-every", "3"])
    assert result.exit_code == 0 and scored == [2], result.output
    assert f"{workdir} is not trained any more, at step 2" in result.output
    with run_lock.locked(str(workdir)):
        monkeypatch.setattr(run_scores, "_wait", lambda seconds: _save(workdir, 4))
        run_scores.watch(str(workdir), _suite(place), tmp_path / "none", every=3, poll_seconds=0, say=lambda line: None)
    assert scored == [2, 4]  # of 2 and 4 the last alone


def test_what_cannot_be_watched_is_said(place, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint under .*, and no run is at work there"):
        run_scores.watch(str(tmp_path / "nowhere"), _suite(place), tmp_path / "out")
    later = Recipe(stage="super-resolution", unet="demo-II", text_encoder_from="x", data=DataConfig(size=256))
    _save(tmp_path / "later", 2, later)
    with pytest.raises(ValueError, match="trains a super-resolution stage, which draws nothing by itself"):
        run_scores.watch(str(tmp_path / "later"), _suite(place), tmp_path / "out")
    words = ["evaluate", "--suite", "coco", "--captions", "x", "--watch", "runs/I"]
    for more, message in (
        (["--cascade", "x"], "--cascade would do nothing: --watch scores a run's own checkpoints"),
        (["--watch-every", "0"], "--watch-every is 0: give 1 or more steps"),
    ):
        result = CliRunner().invoke(cli.main, [*words, *more])
        assert result.exit_code == 1 and message in result.output and result.output.count("\n") == 1
    result = CliRunner().invoke(cli.main, ["evaluate", "--suite", "coco", "--captions", "x", "--watch-every", "2"])
    assert result.exit_code == 1 and "--watch-every would do nothing: it goes with --watch" in result.output
