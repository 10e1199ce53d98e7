"""What makes up a run folder, in a bucket: checkpoints, seals, metrics. A whole run: tests/training/test_bucket.py."""

from __future__ import annotations

import os
from unittest import mock

import bucket
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from if_jax.checkpoints import run
from if_jax.doctor import storage
from if_jax.tracking.writer import MetricWriter

RUN = f"gs://{bucket.NAME}/run"
RECIPE = {"recipe": {"ema_decays": [0.9]}}


@pytest.fixture(scope="module")
def far():
    pytest.importorskip("gcsfs", reason="gs:// paths need gcsfs: pip install gcsfs")
    with bucket.serve() as (served, variables), mock.patch.dict(os.environ, variables):
        yield served
        assert not served.refused


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(far):
    state = {"a": jnp.arange(100_000.0), "ema": {"0.9": {"w": jnp.ones((3, 3))}}}
    with run.open_checkpoints(RUN, RECIPE, keep=2) as saved:
        for step in (1, 2, 3):
            saved.save(step, state)
    assert not any(name.startswith("run/checkpoints/1/") for name in far.objects)  # two are kept
    assert run.set_aside_damaged(RUN) == [] and run.read_latest(RUN) == (3, RECIPE)
    _, written = far.objects.pop("run/checkpoints/3/commit_success.txt"), set(far.objects)  # killed just before it
    assert run.set_aside_damaged(RUN) == [] and run.read_latest(RUN) == (2, RECIPE) and run.read_ema(RUN)[0] == 2
    assert set(far.objects) == written
    far.put("run/checkpoints/3/commit_success.txt", b"")
    of_newest = [name for name in far.objects if name.startswith("run/checkpoints/3/")]
    bucket.flip_a_byte(far, max(of_newest, key=lambda name: len(far.objects[name][0])))
    assert run.set_aside_damaged(RUN) == [3] and run.read_latest(RUN) == (2, RECIPE)
    assert sum(name.startswith("run/checkpoints/3.damaged/") for name in far.objects) == len(of_newest)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    with run.open_checkpoints(RUN, RECIPE, keep=2) as saved:
        jax.tree.map(np.testing.assert_array_equal, saved.restore(abstract, 2), state)
    step, metadata, ema = run.read_ema(RUN)
    assert (step, metadata) == (2, RECIPE) and ema["w"].shape == (3, 3)


def test_metrics_and_pictures_are_copied_and_go_on(far):
    red = Image.new("RGB", (4, 3), (255, 0, 0))
    first = MetricWriter(RUN, 0)  # is never closed: the machine is lost
    first.scalars(1, {"loss": 0.5})
    first.pictures(1, "samples", red, {})
    first.flush()
    first.scalars(2, {"loss": 0.4})
    second = MetricWriter(RUN, 1)
    second.scalars(2, {"loss": 0.3})
    second.close()
    assert far.objects["run/metrics.jsonl"][0] == b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.3}\n'
    assert "run/samples/samples-0000001.png" in far.objects
    assert sum(name.startswith("run/tensorboard/") for name in far.objects) == 2
    first.close()


def test_the_doctor_writes_into_it(far):
    before = set(far.objects)
    assert storage.writable(RUN).status == "pass" and set(far.objects) == before
