"""The reader on renders it never saw, and the whole command on a tiny cascade."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import tiny
from click.testing import CliRunner

from if_jax.checkpoints.release import write_cascade
from if_jax.cli import main
from if_jax.evaluation.synth import eval_prompts, reading
from if_jax.evaluation.synth.suite import render
from if_jax.scenes import geometry
from if_jax.scenes.scene import as_numpy

PROMPTS, SEED = 42, 5


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """One run of the command, no OCR being installed, and the same again."""
    folder = tmp_path_factory.mktemp("synth")
    stages = tuple(tiny.on_one_level(stage) for stage in tiny.stages())
    write_cascade(folder / "cascade", stages, tiny.DEFAULTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "rapidocr_onnxruntime", None)
        patch.setenv("PATH", str(folder))
        patch.setenv("XDG_CACHE_HOME", str(folder))
        arguments = ["evaluate", "--cascade", str(folder / "cascade"), "--prompts", str(PROMPTS), "--seed", str(SEED)]
        arguments += ["--out", str(folder / "out"), "--json", str(folder / "scores.json")]
        first = CliRunner().invoke(main, arguments)
        times = {path: path.stat().st_mtime_ns for path in (folder / "out/pictures").iterdir()}
        again = CliRunner().invoke(main, arguments)
    assert first.exit_code == 0, first.output
    assert again.exit_code == 0, again.output
    return folder, first.output, times


def test_everything_is_in_the_report(evaluated):
    folder, output, _ = evaluated
    scores = json.loads((folder / "scores.json").read_text())
    names = ("overall", *eval_prompts.OBJECT_SKILLS, "words_exact")
    assert {*names, *(f"{name}_ci" for name in names)} <= scores.keys()
    assert scores["words_exact"] is None
    assert "no rapidocr" in output and "no tesseract" in output
    assert scores["prompts"] == {"count": PROMPTS, "seed": SEED}
    assert all(len(scores[key]) == 64 for key in ("cascade_sha256", "prompts_sha256"))
    assert len(scores["reader"]["sha256"]) == 64
    assert scores["loss"].keys() == {"I", "II"}
    assert scores["super_resolution"]["psnr"].keys() >= {"bicubic", "level_0", "default"}
    page = (folder / "out/report.html").read_text()
    assert page.count("<figure") == PROMPTS + PROMPTS // 7
    assert "overall" in output and "report.html" in output


def test_true_renders_score_high_blurred_ones_less_shuffled_ones_least(evaluated):
    scores = json.loads((evaluated[0] / "scores.json").read_text())
    true, blurred, shuffled = (scores["calibration"][kind]["overall"] for kind in ("true", "blurred", "shuffled"))
    assert true > 0.9 > blurred > shuffled
    assert shuffled < 0.25
    assert scores["overall"] < 0.2  # an untrained cascade draws noise, and the reader says so


def test_pictures_that_are_drawn_are_kept_and_others_refused(evaluated):
    folder, _, times = evaluated
    assert times == {path: path.stat().st_mtime_ns for path in (folder / "out/pictures").iterdir()}
    arguments = ["evaluate", "--cascade", str(folder / "cascade"), "--prompts", str(PROMPTS), "--seed", "6"]
    refused = CliRunner().invoke(main, [*arguments, "--out", str(folder / "out")])
    assert refused.exit_code == 1 and "another cascade, seed or setting" in refused.output


def test_the_shipped_reader_reads_renders():
    _, batch = eval_prompts.sample_prompts(PROMPTS, SEED + 1)
    objects = reading.read(render(batch, reading.PIXELS))
    totals = [reading.compare(*pair) for pair in zip(as_numpy(batch), objects, strict=True)]
    share = {
        name: sum(total[name] for total in totals) / sum(total["objects"] for total in totals) for name in totals[0]
    }
    for name in ("found", "shape", "colour", "size", "material"):
        assert share[name] > 0.95, name
    assert share["invented"] < 0.02
    assert np.mean([total["scene"] for total in totals]) > 0.85
    assert reading.read(np.full((1, 64, 64, 3), 0.6, np.float32)) == [[]]


def test_where_an_object_is_seen_tells_where_it_stands():
    for size in (0, 1):
        x, y = 0.7, -0.4
        right, up = geometry.project(x, y, geometry.middle_height(size))
        column, row = geometry.to_pixels((right, up), 1)
        assert geometry.unproject((column, row), size) == pytest.approx((right, y), abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "coco"], "--captions is missing: which captions are drawn?"),
        (["--prompts", "6"], "6 prompts: use 21 or more"),
        (["--cascade", "nowhere"], "nowhere"),
        (["--json", "nowhere/scores.json"], "its folder does not exist"),
    ],
)
def test_mistakes_cost_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    refused = CliRunner().invoke(main, ["evaluate", "--out", str(tmp_path / "out"), *arguments])
    assert refused.exit_code == 1 and message in refused.output and len(refused.output.strip().splitlines()) <= 2
    assert not (tmp_path / "out").exists()
