"""Through the command line, in real processes: built data, both demo recipes, `kill -9`, the same command again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # the demo nets compile for a minute in every process

ROOT = Path(__file__).parent.parent.parent
SHORT = {"batch_size": 4, "steps": 30, "log_every": 5, "checkpoint_every": 10, "sample.every": 0}
SHORT |= {"optimizer.warmup_steps": 5}


def command(*words: object) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "if_jax", *map(str, words)]


def train(name: str, workdir: Path, **more: object) -> list[str]:
    keys = [f"--config.{key}={value}" for key, value in {**SHORT, **more}.items()]
    return command("train", "--config", ROOT / f"configs/{name}.py", "--workdir", workdir, *keys)


def environment() -> dict[str, str]:
    return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def losses(workdir: Path) -> list[dict]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in ("step", "loss", "mse", "vb", "grad_norm")} for row in rows]


def kill_when_step_is_logged(run: list[str], workdir: Path, step: int) -> None:
    """Start the run in a process group of its own and kill it, without warning, once it has written that step."""
    with subprocess.Popen(run, env=environment(), start_new_session=True) as process:
        metrics = workdir / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and f'"step": {step}' in metrics.read_text()):
            time.sleep(0.2)
        assert process.poll() is None, "the run ended before it could be killed"
        os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("name", ["demo_base", "demo_sr"])
def test_a_killed_run_repeats_the_losses_bit_for_bit(name, tmp_path):
    data = tmp_path / "scenes"
    subprocess.run(command("data", "build", "scenes", "--count", 64, "--out", data), env=environment(), check=True)
    more = {"data.source": data}
    if name == "demo_sr":
        more["text_encoder_from"] = ROOT / "if_jax/demo/stage_I"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(train(name, whole, **more), env=environment(), check=True)
    kill_when_step_is_logged(train(name, killed, **more), killed, step=20)
    assert losses(killed)[-1]["step"] < 30
    subprocess.run(train(name, killed, **more), env=environment(), check=True)
    assert losses(killed) == losses(whole)
    rows = losses(whole)
    assert [row["step"] for row in rows] == [5, 10, 15, 20, 25, 30] and rows[-1]["loss"] < rows[0]["loss"]
