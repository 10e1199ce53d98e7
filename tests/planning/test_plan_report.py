"""What `if-jax plan` prints: one screen that says what fits, how long it takes, and how sure that is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import fake_figures
import pytest
import tiny
from click.testing import CliRunner, Result

from if_jax.cli import main
from if_jax.planning import memory, plan
from if_jax.planning.blocks import Block

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "tests/tiny_recipe.py")


@pytest.fixture(scope="module", autouse=True)
def preset() -> Iterator[None]:
    """What the recipe adds to the presets is taken out again."""
    with tiny.as_presets():
        yield


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> list[list[Block]]:
    """The cost table in place of the compiler; returns what it was asked for."""
    asked: list[list[Block]] = []

    def figures(blocks: Iterable[Block], *_: Any) -> dict[Block, dict[str, Any]]:
        asked.append(list(blocks))
        rows = fake_figures.figures(asked[-1], per_cycle=0.01)
        lost = next(block for block in asked[-1] if block.kind == "attention")
        kernel = next(block for block in asked[-1] if block.kind == "ends")
        rows[kernel] |= {"unestimated": {"tpu_custom_call": 2}}
        return rows | {lost: {"error": "the compiler crashed (exit code -6): RET_CHECK failure"}}

    monkeypatch.setattr(plan, "figures_of", figures)
    monkeypatch.setattr(plan, "libtpu_version", lambda: "0.0.99")
    return asked


def _run(*words: str) -> Result:
    return CliRunner().invoke(main, ["plan", "--config", RECIPE, *words])


def test_a_page_is_one_screen_and_names_what_is_not_known() -> None:
    result = _run("--slice", "v5e-8", "--price", "1.2")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 100
    text = " ".join(result.output.split())
    assert lines[0] == "tiny-I on v5e-8: 8 chips (2×4) in 1 host(s)"
    assert "A step is 8 pictures: 8 devices × 1 part(s) × 1 pictures at a time." in text
    assert "parameters" in text and "fits" in text
    assert "cost at 1.2 a chip-hour" in text
    assert "the compiler failed on 1 block(s)" in text and "RET_CHECK failure" in text
    assert "2× tpu_custom_call" in text
    assert "was made with libtpu 0.0.52" in text  # another one than the calibrated
    assert f"if-jax train --config {RECIPE} --workdir gs://BUCKET/runs/tiny_recipe" in text
    assert "TYPE=v5litepod-8; PRICE=1.2" in text


def test_numbers_are_those_of_the_page() -> None:
    result = _run("--slice", "v5e-8", "--json", "--price", "2")
    made = json.loads(result.output)
    assert made["chips"] == 8 and made["fits"] and made["memory_bytes"]["parameters"] > 0
    step = made["step_seconds"]
    assert step["best"] <= step["estimate"] <= step["worst"]
    assert made["chip_hours"]["estimate"] == pytest.approx(step["estimate"] * 100_000 * 8 / 3600)
    assert made["cost"]["worst"] == pytest.approx(2 * made["chip_hours"]["worst"])
    assert made["pictures_a_second"] == pytest.approx(8 / step["estimate"])
    assert list(made["blocks_without_figures"]) and made["operations_without_estimate"] == {"tpu_custom_call": 2}


def test_what_does_not_fit_is_planned_in_more_parts_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_kept", lambda block: 3 * 2**30 * (block.kind == "ends"))
    result = _run("--slice", "v5e-1")
    text = " ".join(result.output.split())
    assert result.exit_code == 0, result.output
    assert "as written it does not fit: 8 picture(s) at a time would need 52 GB of a device" in text
    assert "--config.accumulate=4" in text and "8 pictures: 1 devices × 4 part(s) × 2 pictures" in text


def test_what_fits_nowhere_compiles_nothing(monkeypatch: pytest.MonkeyPatch, table: list[list[Block]]) -> None:
    monkeypatch.setattr(memory, "_kept", lambda block: 30 * 2**30 * (block.kind == "ends"))
    result = _run("--slice", "v5e-8")
    assert result.exit_code == 1, result.output
    assert "DOES NOT FIT" in result.output and "no accumulate makes it fit" in " ".join(result.output.split())
    assert not table and "To start it" not in result.output


def test_a_search_prints_three_ways_and_how_each_is_started(table: list[list[Block]]) -> None:
    result = _run("--slice", "v5e-4", "--search", "--config.batch_size=32")
    assert result.exit_code == 0, result.output
    assert len(table) <= 4
    assert [line[:2] for line in result.output.splitlines() if line[:2] in ("1.", "2.", "3.")] == ["1.", "2.", "3."]
    assert result.output.count("if-jax train") == 3 and result.output.count("TYPE=v5litepod-4") == 3
    assert max(map(len, result.output.splitlines())) <= 110


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--slice", "v9-4"), "slice 'v9-4' is unknown: use v4-8 … v4-4096 or v5e-1 … v5e-256"),
        (("--slice", "v5e-4", "--config.mesh.fsdp=3"), "mesh data=-1, fsdp=3, tensor=1 does not fit 4 device(s)"),
        (("--slice", "v5e-16"), "batch_size 8 does not divide over 16 devices: use a multiple of 16"),
        (("--slice", "v5e-4", "--price", "0"), "Invalid value for '--price'"),
        (("--slice", "v5e-4", "--search", "--whole"), "--whole would do nothing"),
        (("--slice", "v5e-4", "--config.text_encoder_from=nowhere"), "text_encoder_from 'nowhere' is not here"),
        (("--slice", "v5e-4", "--config.text_encoder_from=t5-v1_1-small"), "makes states of width 512"),
    ],
)
def test_bad_input_is_one_line(words: tuple[str, ...], message: str) -> None:
    result = _run(*words)
    assert result.exit_code != 0 and message in result.output
    assert "Traceback" not in result.output


def test_no_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("if_jax.planning.compiling.sys.platform", "darwin")
    result = _run("--slice", "v5e-8")
    assert result.exit_code == 1 and "Linux x86_64 alone" in result.output
