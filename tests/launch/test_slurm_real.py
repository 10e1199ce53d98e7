"""launch/slurm.sh on a real Slurm of one node: a job is told to end, saves, goes back into the queue and resumes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_recipe

ROOT = Path(__file__).parents[2]
NODE = ["bash", str(ROOT / "tests/launch/slurm_node.sh")]
PATH = os.environ["PATH"] + ":/usr/sbin"
RECIPE = tiny_recipe.arguments({"steps": 60, "checkpoint_every": 20, "validation.every": 0})
MISSING = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name, path=PATH)]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"no {', '.join(MISSING)}: apt-get install --no-install-recommends slurm-wlm munge",
    ),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Calls a command of a running Slurm in its folder; (exit code, what it printed)."""
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "bin").mkdir()
    command = folder / "bin" / "if-jax"  # of this checkout, whether it is installed or not
    command.write_text(f'#!/bin/bash\nexec {sys.executable} -m if_jax "$@"\n')
    command.chmod(0o755)
    environment = os.environ | {"SLURM_CONF": str(folder / "node/slurm.conf"), "PATH": f"{command.parent}:{PATH}"}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # compiling is what takes long

    def call(*words: str, **variables: str) -> tuple[int, str]:
        done = subprocess.run(
            words, cwd=folder, env=environment | variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        return done.returncode, done.stdout

    call.folder = folder
    code, output = call(*NODE, "start", "node")
    assert code == 0, output
    yield call
    call("scancel", "--state", "RUNNING")
    call(*NODE, "stop", "node")


def test_a_job_saves_resumes_and_ends_with_the_losses_of_one_process(slurm):
    train = [*RECIPE, "--workdir"]
    code, output = slurm("if-jax", "train", *train, "alone", JAX_NUM_CPU_DEVICES="2")
    assert code == 0, output
    code, output = slurm("sbatch", "--parsable", "--ntasks", "2", str(ROOT / "launch/slurm.sh"), *train, "job")
    assert code == 0, output
    job, log = output.strip(), slurm.folder / f"if_jax-{output.strip()}.log"
    _wait(lambda: len(_rows(slurm.folder / "job")) > 2 or _state(slurm, job) == "FAILED", log)
    code, output = slurm("scancel", "--signal", "TERM", job)  # to the tasks alone, as before the time limit
    assert code == 0, output
    _wait(lambda: _state(slurm, job) in ("COMPLETED", "FAILED"), log)
    assert _state(slurm, job) == "COMPLETED", log.read_text()
    assert "ended with code 143: back into the queue" in log.read_text()
    assert _fact(slurm, job, "Restarts") == "1"
    assert len(_rows(slurm.folder / "job")) == 60
    assert _rows(slurm.folder / "job") == _rows(slurm.folder / "alone")


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (RECIPE, {}, "error: --workdir is missing"),
        ([*RECIPE, "--workdir", "r"], {"IF_JAX_MODULES": "no/1"}, 'error: IF_JAX_MODULES is "no/1"'),
        ([*RECIPE, "--workdir", "r"], {"IF_JAX_VENV": "/nowhere"}, "error: IF_JAX_VENV is /nowhere"),
    ],
)
def test_a_mistake_fails_the_job_with_one_line(slurm, arguments, variables, message):
    code, output = slurm("sbatch", "--parsable", "--wait", str(ROOT / "launch/slurm.sh"), *arguments, **variables)
    job = output.split()[0]
    log = (slurm.folder / f"if_jax-{job}.log").read_text()
    assert code == 2 and log.startswith(message) and log.count("\n") == 1, log
    assert _state(slurm, job) == "FAILED" and _fact(slurm, job, "Restarts") == "0"


def _state(slurm, job: str) -> str:
    return _fact(slurm, job, "JobState")


def _fact(slurm, job: str, name: str) -> str:
    """One field of `scontrol show job`, whose lines are NAME=VALUE pairs."""
    pairs = (pair.partition("=") for pair in slurm("scontrol", "show", "job", job)[1].split())
    return next(value for own, _, value in pairs if own == name)


def _rows(workdir: Path) -> list[dict[str, float]]:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{name: row[name] for name in ("step", "loss", "grad_norm")} for row in rows if "loss" in row]


def _wait(happens, log: Path, seconds: float = 1800) -> None:
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, log.read_text() if log.exists() else "the job never started"
        time.sleep(0.1)
