"""The shipped supervisor on real processes: one is killed, all start again, and the losses are the undisturbed ones."""

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
KEYS = {"data.size": 16, "batch_size": 8, "steps": 12, "log_every": 2, "checkpoint_every": 4, "sample.every": 0}
KEYS |= {"mesh.data": 1, "mesh.fsdp": 2, "mesh.rules": "fsdp", "hosts.heartbeat_seconds": 10, "hosts.step_seconds": 120}


def _start(workdir):
    recipe = ["--config", "configs/demo_base.py", *(f"--config.{key}={value}" for key, value in KEYS.items())]
    command = ["bash", "launch/local.sh", "2", "--", *recipe, "--workdir", str(workdir)]
    environment = os.environ | {"PYTHON": sys.executable, "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""}
    with _log(workdir).open("w") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def _log(workdir):
    return workdir.with_suffix(".log")


def _processes(workdir):
    """The training processes of a run, by their number."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:  # it has just ended
            continue
        if str(workdir) in words and "--process" in words:
            found[int(words[words.index("--process") + 1])] = int(path.parent.name)
    return found


def _rows(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines() if (workdir / "metrics.jsonl").exists() else []
    return [{name: row[name] for name in ("step", "loss", "grad_norm")} for row in map(json.loads, lines)]


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
def test_a_run_survives_a_process(tmp_path, sent):
    undisturbed = tmp_path.parent / "undisturbed"
    if not undisturbed.exists():
        assert _start(undisturbed).wait(1800) == 0, _log(undisturbed).read_text()
    disturbed = tmp_path / "run"
    run = _start(disturbed)
    deadline = time.monotonic() + 900
    while not _rows(disturbed) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(_processes(disturbed)[1], sent)
    assert run.wait(1800) == 0, _log(disturbed).read_text()
    assert "starting again" in _log(disturbed).read_text()
    assert _rows(disturbed) == _rows(undisturbed)
