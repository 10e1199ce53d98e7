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

TESTS = Path(__file__).parent.parent
CONFIG = """
import tiny
from if_jax.models import presets
from if_jax.recipes import default_recipe

presets.UNETS["tiny-I"] = tiny.one_level(tiny.BASE)
presets.T5_ENCODERS["tiny"] = tiny.TEXT


def get_config():
    config = default_recipe()
    config.unet, config.text_encoder = "tiny-I", "tiny"
    config.batch_size, config.steps, config.log_every, config.checkpoint_every = 8, 60, 1, 20
    config.data.size, config.data.threads = 8, 1
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 3e-3, 2
    config.sample.every, config.sample.steps = 60, "2"
    return config
"""


@pytest.mark.slow
def test_a_run_in_a_bucket_is_the_run_on_a_disk(tmp_path):
    pytest.importorskip("gcsfs", reason="gs:// paths need gcsfs: pip install gcsfs")
    (tmp_path / "recipe.py").write_text(CONFIG)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    environment |= {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # compiling is what takes long

    def start(workdir):
        command = [sys.executable, "-m", "if_jax", "train", "--config", "recipe.py", "--workdir", workdir]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)

    calm = start("disk")
    told = calm.communicate(timeout=1800)[0]
    assert calm.returncode == 0, told
    with bucket.serve() as (far, variables):
        environment |= variables
        first = start(f"gs://{bucket.NAME}/runs/I")
        _wait_for("runs/I/checkpoints/40/sha256.json", far, first)
        first.kill()
        first.communicate()
        assert len(_rows(far.objects["runs/I/metrics.jsonl"][0])) >= 40
        damaged = _flip_a_byte(far, "runs/I/checkpoints/40/")
        second = start(f"gs://{bucket.NAME}/runs/I")
        told = second.communicate(timeout=1800)[0]
        assert second.returncode == 0, told
        assert "checkpoint 40 of gs://bucket/runs/I is damaged" in told and damaged in told
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
