"""Checkpoints of a run: sealed with checksums once complete, and set aside where a byte has changed since."""

from __future__ import annotations

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from if_jax.checkpoints import run
from if_jax.checkpoints.seal import SEAL, damage

METADATA = {"recipe": {"ema_decays": [0.9]}}


def _state(step):
    kernel = jax.random.normal(jax.random.key(step), (64, 64))
    weights = {"unet": {"kernel": kernel, "bias": jnp.arange(8.0) * step}}
    return {"step": jnp.int32(step), "ema": {"0.9": weights}}


def _abstract():
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), _state(0))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    with run.open_checkpoints(str(workdir), METADATA, keep=2, keep_every=20) as saved:
        for step in (10, 20, 30, 40, 50):
            saved.save(step, _state(step))
    return workdir


@pytest.fixture
def workdir(written, tmp_path):
    shutil.copytree(written, tmp_path / "run")
    return tmp_path / "run"


def _content(workdir, step):
    """The largest file of a checkpoint: the arrays."""
    files = [path for path in (workdir / "checkpoints" / str(step)).rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_the_newest_and_every_nth_are_kept_and_sealed(written):
    folder = written / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["20", "40", "50"]
    assert all((path / SEAL).is_file() and damage(path) is None for path in folder.iterdir())


def _truncate(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("harm", "words"),
    [(_flip, "SHA-256 differs"), (_truncate, "were written"), (os.remove, "is missing")],
    ids=["flipped byte", "truncated", "removed"],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(workdir, harm, words):
    harm(_content(workdir, 50))
    assert words in damage(workdir / "checkpoints" / "50")
    with pytest.raises(ValueError, match=r"checkpoint 50 of .* is damaged") as caught:
        run.read_ema(str(workdir))
    assert "\n" not in str(caught.value)
    assert run.set_aside_damaged(str(workdir)) == [50]
    assert (workdir / "checkpoints" / "50.damaged").is_dir()
    assert run.read_latest(str(workdir)) == (40, METADATA)
    with run.open_checkpoints(str(workdir), METADATA, keep=2) as saved:
        restored = saved.restore(_abstract())
        saved.save(50, _state(50))
    jax.tree.map(np.testing.assert_array_equal, restored, _state(40))
    assert run.set_aside_damaged(str(workdir)) == []
    assert run.read_ema(str(workdir))[0] == 50


def test_damage_after_damage(workdir):
    _flip(_content(workdir, 50))
    (workdir / "checkpoints" / "40" / SEAL).write_text("{")
    assert run.set_aside_damaged(str(workdir)) == [50, 40]
    assert run.read_latest(str(workdir))[0] == 20
    _flip(_content(workdir, 20))
    with pytest.raises(ValueError, match=r"no checkpoint of .* is sound \(20: .*SHA-256"):  # never begun anew unasked
        run.set_aside_damaged(str(workdir))
    assert (workdir / "checkpoints" / "20").is_dir()


def test_an_unsealed_checkpoint_is_used(workdir):
    """Killed between the last byte and the seal: complete, so nothing is lost."""
    (workdir / "checkpoints" / "50" / SEAL).unlink()
    assert run.set_aside_damaged(str(workdir)) == []
    step, _, ema = run.read_ema(str(workdir))
    assert step == 50
    jax.tree.map(np.testing.assert_array_equal, ema, _state(50)["ema"]["0.9"])


def test_an_average_is_read_while_the_run_goes_on(workdir, monkeypatch):
    """The run saves a newer checkpoint, and removes the one that is being read."""
    folder, problem = workdir / "checkpoints", run._problem
    (folder / "50").rename(workdir / "not yet")

    def meanwhile(*words):
        if not (folder / "50").exists():
            (workdir / "not yet").rename(folder / "50")
            shutil.rmtree(folder / "40")
        return problem(*words)

    monkeypatch.setattr(run, "_problem", meanwhile)
    assert run.read_ema(str(workdir))[0] == 50


def test_a_fresh_run_has_nothing_to_check(tmp_path):
    assert run.set_aside_damaged(str(tmp_path / "nothing")) == []
