"""One evaluation drawn by two real processes of two devices each: the bits of one, and one line for a mistake."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from PIL import Image

from if_jax.checkpoints.release import write_cascade

TESTS = Path(__file__).parent.parent
TEXTS = [f"{number} red cubes" for number in range(10)]
SMALL_CHUNKS = """
import sys
from if_jax import cli
from if_jax.evaluation import captioned
captioned.CHUNK = 3
cli.main()
"""
pytestmark = pytest.mark.slow  # every process compiles its programs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny cascade, captions and true pictures."""
    folder = tmp_path_factory.mktemp("shared")
    write_cascade(folder / "cascade", [tiny.on_one_level(tiny.stages()[0])], tiny.DEFAULTS[:1])
    (folder / "captions.txt").write_text("\n".join(TEXTS))
    (folder / "true").mkdir()
    for number in range(6):
        Image.new("RGB", (8, 8), (40 * number, 90, 200)).save(folder / "true" / f"{number}.png")
    return folder


def _run(place: Path, out: Path, count: int, *more: tuple[str, ...]) -> list[subprocess.CompletedProcess[str]]:
    """So many processes at once; `more`: further words of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    words = ["evaluate", "--suite", "coco", "--cascade", place / "cascade", "--stages", 1, "--prompts", len(TEXTS)]
    words += ["--captions", place / "captions.txt", "--reference", place / "true", "--out", out]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(TESTS.parent)}
    started = []
    for number in range(count):
        own = list(more[number] if number < len(more) else ())
        own += ["--coordinator", coordinator, "--processes", count, "--process", number] if count > 1 else []
        command = [sys.executable, "-c", SMALL_CHUNKS, *map(str, [*words, *own])]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, env=environment, **pipes))
    ended = []
    for process in started:
        try:
            output = process.communicate(timeout=600)[0]
        finally:
            process.kill()
        ended.append(subprocess.CompletedProcess(process.args, process.returncode, output))
    return ended


def test_two_processes_measure_the_bits_of_one(place, tmp_path):
    both = _run(place, tmp_path / "two", 2)
    assert [process.returncode for process in both] == [0, 0], [process.stdout for process in both]
    assert "kernel_distance" in both[0].stdout and "kernel_distance" not in both[1].stdout
    (alone,) = _run(place, tmp_path / "one", 1)
    assert alone.returncode == 0, alone.stdout
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    for word in ("measures", "reference", "prompts_sha256"):
        assert one[word] == two[word], word


def test_processes_that_would_draw_something_else_are_named(place, tmp_path):
    both = _run(place, tmp_path / "out", 2, (), ("--seed", "4"))
    for process in both:
        errors = [line for line in process.stdout.splitlines() if line.startswith("Error: ")]
        assert process.returncode == 1 and len(errors) == 1, process.stdout
        assert "differs from process 0" in errors[0] and "settings" in errors[0]
    assert not list(tmp_path.glob("out/pictures/*"))
