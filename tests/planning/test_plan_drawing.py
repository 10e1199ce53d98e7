"""`if-jax plan --cascade`: what a thousand pictures take on a slice, of a release or of presets by name."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fake_figures
import pytest
import tiny
from click.testing import CliRunner, Result

from if_jax.checkpoints.release import write_cascade
from if_jax.cli import main
from if_jax.diffusion.schedule import parse_steps
from if_jax.planning import drawing
from if_jax.planning.blocks import Block
from if_jax.planning.slices import parse_slice


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> list[Block]:
    """The cost table in place of the compiler; returns what it was asked for."""
    asked: list[Block] = []

    def figures(blocks: Iterable[Block], *_: Any) -> dict[Block, dict[str, Any]]:
        asked.extend(blocks)
        return fake_figures.figures(asked)

    monkeypatch.setattr(drawing, "figures_of", figures)
    monkeypatch.setattr(drawing, "libtpu_version", lambda: "0.0.99")
    return asked


def _run(*words: str) -> Result:
    return CliRunner().invoke(main, ["plan", *words])


def test_the_calls_are_those_of_the_cascade() -> None:
    """At the full rate of the chip the share of peak is one: every call and both branches of guidance are counted."""
    nets = drawing.read_nets("IF-I-M,IF-II-M")
    plan = drawing.plan_drawing(nets, parse_slice("v5e-4"), batch=4, price=2.0)
    names = [(row.part.name, row.part.calls, row.part.rows) for row in plan.parts]
    calls = [len(parse_steps(default.sample_timestep_respacing)) for default in nets.defaults]
    assert names == [("text encoder", 1, 4), ("I", calls[0], 8), ("II", calls[1], 8)]
    g = plan.slice.generation
    for row in plan.parts:
        assert row.peak_share.middle == pytest.approx(131072.0 * g.hertz / g.peak_flops, rel=0.02)
    assert plan.total.middle == pytest.approx(sum(row.time.middle for row in plan.parts))
    assert plan.chip_hours.middle == pytest.approx(1000 * plan.total.middle / 4 / 3600)


def test_without_guidance_a_call_is_half_as_many(table: list[Block]) -> None:
    nets = drawing.read_nets("demo", stages=2)
    assert [default.guidance_scale for default in nets.defaults] == [2.0, 1.0]
    plan = drawing.plan_drawing(nets, parse_slice("v5e-1"), batch=8)
    assert [row.part.rows for row in plan.parts] == [8, 16, 8]
    assert {block.work for block in table} == {"forward"} and {block.dtype for block in table} == {"bfloat16"}


def test_a_page_of_a_release(tmp_path: Path) -> None:
    write_cascade(tmp_path / "two", tiny.stages(), tiny.DEFAULTS)
    result = _run("--cascade", str(tmp_path / "two"), "--slice", "v5e-8", "--batch", "2", "--price", "1.5")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 100
    assert "text encoder" in result.output and "a thousand pictures" in result.output and "at 1.5" in result.output
    made = json.loads(_run("--cascade", str(tmp_path / "two"), "--slice", "v5e-8", "--batch", "2", "--json").output)
    assert [part["name"] for part in made["parts"]] == ["text encoder", "I", "II"]
    assert made["pictures_a_second"] == pytest.approx(16 / made["batch_seconds"]["estimate"])
    weights = sum(made["memory_bytes"][name] for name in ("UNets", "text encoder"))
    files = sum(path.stat().st_size for path in (tmp_path / "two").rglob("*.safetensors"))
    assert weights == pytest.approx(files / 2, rel=0.05)  # the files are float32, with headers


def test_what_does_not_fit_exits_with_one() -> None:
    result = _run("--cascade", "IF-I-XL,IF-II-L", "--slice", "v5e-1", "--batch", "8")
    assert result.exit_code == 1 and "DOES NOT FIT" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--slice", "v5e-4"), "give either --config, to plan training, or --cascade"),
        (("--cascade", "nowhere", "--slice", "v5e-4"), "'nowhere' is neither a release folder nor one of IF-I-M"),
        (("--cascade", "IF-II-L", "--slice", "v5e-4"), "a base stage comes first"),
        (("--cascade", "demo", "--slice", "v5e-4", "--search"), "--search would do nothing"),
        (("--cascade", "demo", "--slice", "v5e-4", "--config.steps=3"), "recipe keys go with --config"),
        (("--config", "x.py", "--slice", "v5e-4", "--batch", "2"), "--batch would do nothing"),
        (("--cascade", "demo", "--slice", "v9-4"), "slice 'v9-4' is unknown"),
    ],
)
def test_bad_input_is_one_line(words: tuple[str, ...], message: str) -> None:
    result = _run(*words)
    assert result.exit_code != 0 and message in result.output and "Traceback" not in result.output
