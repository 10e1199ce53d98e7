"""The demo from nothing by one command, ended twice on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def start(workdir, *options):
    command = [str(ROOT / "launch/demo.sh"), str(workdir), *options]
    environment = os.environ | {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def interrupt_when(process, path, limit=1800):
    """Ends the command and all it has started, once `path` is there."""
    for _ in range(limit):
        if path.exists():
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return
        assert process.poll() is None, process.communicate()[0][-2000:]
        time.sleep(1)
    pytest.fail(f"no {path} after {limit} s")


@pytest.mark.slow  # twenty minutes: the demo's own nets
def test_the_demo_is_made_from_nothing_although_it_is_ended_twice(tmp_path):
    options = ("--steps", "2", "--prompts", "21")
    interrupt_when(start(tmp_path, *options), tmp_path / "runs/small/checkpoints/1")
    interrupt_when(start(tmp_path, *options), tmp_path / "runs/crops/checkpoints/1")
    last = start(tmp_path, *options)
    output = last.communicate(timeout=3600)[0]
    assert last.returncode == 0, output[-2000:]
    for name in ("small", "large", "demo"):
        assert f"leg {name}: SynthEval" in output
        assert json.loads((tmp_path / f"scores/{name}.json").read_text())["overall"] >= 0
    stages = json.loads((tmp_path / "cascades/demo/cascade.json").read_text())["stages"]
    assert [stage["size"] for stage in stages] == [64, 256, 1024]


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("demo", ["W", "--stepz", "3"], "--stepz is unknown"),
        ("demo", ["W", "--steps", "none"], '--steps is "none": give a number'),
        ("demo", ["W", "--steps"], '--steps is "": give a number'),
        ("demo_fast", ["W", "--stepz", "3"], "--stepz is unknown"),
        ("demo_fast", ["W", "--prompts", "0"], '--prompts is "0": give a number'),
        ("demo_fast", ["W", "--teacher", "none"], '--teacher is "none": give a cascade folder'),
    ],
)
def test_a_wrong_option_is_named(tmp_path, script, options, message):
    process = subprocess.run(
        [str(ROOT / f"launch/{script}.sh"), str(tmp_path / options[0]), *options[1:]], capture_output=True, text=True
    )
    assert process.returncode == 2 and message in process.stderr
