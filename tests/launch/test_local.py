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
RECIPE = """
--config configs/demo_base.py --config.data.size=16 --config.batch_size=8 --config.steps=12 --config.log_every=2
--config.checkpoint_every=4 --config.sample.every=0 --config.mesh.data=1 --config.mesh.fsdp=2 --config.mesh.rules=fsdp
--config.hosts.heartbeat_seconds=10 --config.hosts.step_seconds=120
""".split()


def _start(workdir):
    command = ["bash", "launch/local.sh", "2", "--", *RECIPE, "--workdir", str(workdir)]
    environment = os.environ | {"PYTHON": sys.executable, "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


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
        whole = _start(undisturbed)
        assert whole.wait(1800) == 0, whole.stderr.read()
    run = _start(tmp_path / "run")
    deadline = time.monotonic() + 900
    while not _rows(tmp_path / "run") and time.monotonic() < deadline:
        time.sleep(0.1)
    victim = _processes(tmp_path / "run")[1]
    os.kill(victim, sent)
    assert run.wait(1800) == 0, run.stderr.read()
    assert b"starting again" in run.stderr.read()
    assert _rows(tmp_path / "run") == _rows(undisturbed)
