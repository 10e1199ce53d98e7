"""A run folder in a bucket: killed, damaged and resumed, it ends with the numbers of one on a disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import bucket
import pytest
import tiny_recipe

TESTS = Path(__file__).parent.parent
KEYS = {"steps": 60, "checkpoint_every": 20, "sample.every": 60, "sample.steps": 2}


@pytest.mark.slow
def test_a_run_in_a_bucket_is_the_run_on_a_disk(tmp_path):
    pytest.importorskip("gcsfs", reason="gs:// paths need gcsfs: pip install gcsfs")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    environment |= {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # compiling is what takes long

    def start(workdir):
        command = [sys.executable, "-m", "if_jax", "train", *tiny_recipe.arguments(KEYS), "--workdir", workdir]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)

    calm = start("disk")
    output = calm.communicate(timeout=1800)[0]
    assert calm.returncode == 0, output
    with bucket.serve() as (far, variables):
        environment |= variables
        first = start(f"gs://{bucket.NAME}/runs/I")
        _wait_for("runs/I/checkpoints/40/sha256.json", far, first)
        first.kill()
        first.communicate()
        assert len(_rows(far.objects["runs/I/metrics.jsonl"][0])) >= 40
        damaged = _flip_a_byte(far, "runs/I/checkpoints/40/")
        second = start(f"gs://{bucket.NAME}/runs/I")
        output = second.communicate(timeout=1800)[0]
        assert second.returncode == 0, output
        assert "checkpoint 40 of gs://bucket/runs/I is damaged" in output and damaged in output
        assert not far.refused
    names = set(far.objects)
    assert any(name.startswith("runs/I/checkpoints/40.damaged/") for name in names)
    assert {f"runs/I/checkpoints/{step}/sha256.json" for step in (40, 60)} <= names
    assert "runs/I/samples/samples-0000060.png" in names and any("/tensorboard/" in name for name in names)
    assert _rows(far.objects["runs/I/metrics.jsonl"][0]) == _rows((tmp_path / "disk/metrics.jsonl").read_bytes())
    assert not (tmp_path / "gs:").exists()


def _wait_for(name, far, process):
    while name not in far.objects:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def _flip_a_byte(far, prefix):
    """In the largest object; its name within the checkpoint."""
    name = max((name for name in far.objects if name.startswith(prefix)), key=lambda name: len(far.objects[name][0]))
    bucket.flip_a_byte(far, name)
    return name.removeprefix(prefix)


def _rows(lines):
    rows = [json.loads(line) for line in lines.splitlines()]
    return [{name: row[name] for name in ("step", "loss", "mse", "grad_norm")} for row in rows]
