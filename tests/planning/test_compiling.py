"""The children that compile: crashes are named, what was made is kept. No TPU compiler is needed to see it."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import tiny

from if_jax.planning import compiling
from if_jax.planning.blocks import Block, PassSettings, unet_blocks
from if_jax.planning.slices import GENERATIONS

V5E = GENERATIONS["v5e"]
BLOCKS = list(unet_blocks(tiny.BASE, (8, 8), PassSettings(2, "train", "float32", text_length=5)))
# Answers as the worker does; ends over attention, writes what it was asked for, and libtpu's noise before the answer.
CHILD = """
import json, os, sys
for line in sys.stdin:
    block = json.loads(line)["block"]
    open({log!r}, "a").write(block["kind"] + "\\n")
    print("libtpu says something", flush=True)
    if block["kind"] == "attention":
        print("RET_CHECK failure hlo_instruction.cc", file=sys.stderr, flush=True)
        os.abort()
    print({mark!r} + json.dumps({{"cycles": 7, "by_kind": {{}}, "unestimated": {{}}, "seconds": 1.0}}), flush=True)
"""


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which the child notes what it was asked for."""
    log = tmp_path / "asked"
    script = CHILD.format(log=str(log), mark=compiling.MARK)
    monkeypatch.setattr(compiling, "COMMAND", [sys.executable, "-c", script])
    monkeypatch.setattr(compiling, "libtpu_version", lambda: "0.0.52")
    return log


def test_a_crash_costs_one_block_and_the_rest_is_kept(asked: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, bool, int]] = []

    def progress(block: Block, figures: compiling.Figures, seconds_left: float, left: int) -> None:
        assert seconds_left >= 0
        seen.append((block.kind, "error" in figures, left))

    done = compiling.figures_of(BLOCKS, V5E, tmp_path / "cache", progress)
    assert done.keys() == set(BLOCKS)
    attention = [block for block in BLOCKS if block.kind == "attention"]
    for block in attention:
        assert "crashed" in done[block]["error"] and "RET_CHECK failure" in done[block]["error"]
    assert all(done[block]["cycles"] == 7 for block in BLOCKS if block not in attention)
    assert len(seen) == len(BLOCKS) and seen[-1][2] == 0
    assert [kind for kind, failed, _ in seen if failed] == ["attention"] * len(attention)
    # The next plan asks for what failed, and for nothing else.
    asked.unlink()
    assert compiling.figures_of(BLOCKS, V5E, tmp_path / "cache") == done
    assert set(asked.read_text().split()) == {"attention"}


def test_a_block_that_takes_too_long_is_named(tmp_path: Path, asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "COMMAND", [sys.executable, "-c", "import time; time.sleep(60)"])
    done = compiling.figures_of(BLOCKS[:1], V5E, None, timeout=0.5)
    assert done[BLOCKS[0]] == {"error": "the compiler had not finished after 0 seconds"}


def test_the_key_holds_all_that_figures_follow_from(monkeypatch: pytest.MonkeyPatch) -> None:
    block = BLOCKS[0]
    keys = {compiling.key_of(block, V5E, "0.0.52")}
    for change in ({"rows": 3}, {"dtype": "bfloat16"}, {"work": "forward"}, {"remat": "dots"}, {"sizes": ()}):
        keys.add(compiling.key_of(dataclasses.replace(block, **change), V5E, "0.0.52"))
    keys.add(compiling.key_of(block, GENERATIONS["v6e"], "0.0.52"))
    keys.add(compiling.key_of(block, V5E, "0.0.53"))
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=65536")
    keys.add(compiling.key_of(block, V5E, "0.0.52"))
    monkeypatch.setattr(compiling.metadata, "version", lambda name: "9.9")
    keys.add(compiling.key_of(block, V5E, "0.0.52"))
    assert len(keys) == 10


def test_a_damaged_cache_is_compiled_again(asked: Path, tmp_path: Path) -> None:
    block = next(block for block in BLOCKS if block.kind == "ends")
    (tmp_path / f"{compiling.key_of(block, V5E, '0.0.52')}.json").write_text("{")
    assert compiling.figures_of([block], V5E, tmp_path)[block]["cycles"] == 7
    assert json.loads((tmp_path / f"{compiling.key_of(block, V5E, '0.0.52')}.json").read_text())["cycles"] == 7


def test_without_the_compiler_or_on_another_machine_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise compiling.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(compiling.metadata, "version", missing)
    with pytest.raises(ValueError, match=r"pip install 'if_jax\[tpu\]'"):
        compiling.libtpu_version()
    monkeypatch.setattr(compiling.sys, "platform", "darwin")
    with pytest.raises(ValueError, match=r"Linux x86_64 alone, not on darwin"):
        compiling.libtpu_version()
