"""The lock of a run folder: a second run is refused, a dead one leaves it to the next, on disks and in buckets."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import threading
from unittest import mock

import bucket
import pytest

from if_jax.parallel import failures, run_lock


@pytest.fixture(params=["disk", "bucket"])
def workdir(request, tmp_path):
    if request.param == "disk":
        yield str(tmp_path / "run")
        return
    with bucket.serve() as (far, variables), mock.patch.dict(os.environ, variables):
        yield f"gs://{bucket.NAME}/run"
        assert not far.refused and "run/run.lock" not in far.objects


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 0.3)
    monkeypatch.setattr(run_lock, "_POLL_SECONDS", 0.02)


def _leave(workdir, **changes):
    """A lock as another run has left it; the store."""
    store = run_lock._open(workdir)
    holder = dataclasses.replace(run_lock._this_process(), token="another", **changes)
    store.write(run_lock.LOCK, run_lock._encoded(holder)).result()
    return store, holder


def test_a_second_run_is_refused_and_the_folder_is_free_afterwards(workdir):
    with run_lock.locked(workdir):
        words = rf"\(process {os.getpid()}, since .*\) is at work in {workdir}: let it end"
        with pytest.raises(ValueError, match=words), run_lock.locked(workdir):
            pytest.fail("two runs at once")
        assert json.loads(run_lock._open(workdir).read(run_lock.LOCK).result().value)["process"] == os.getpid()
    assert run_lock._open(workdir).read(run_lock.LOCK).result().state == "missing"


def test_a_dead_run_is_followed_at_once(workdir):
    ended = subprocess.Popen(["true"])
    ended.wait()
    _leave(workdir, process=ended.pid)
    with run_lock.locked(workdir):
        pass
    _leave(workdir, process_start=1.0)  # the number of this process, but of one that had it before
    with run_lock.locked(workdir):
        pass


def test_a_run_on_another_machine_is_known_by_its_beat(tmp_path, quick):
    workdir = str(tmp_path)
    store, holder = _leave(workdir, machine="elsewhere", host="far")
    done = threading.Event()

    def live():
        for beat in itertools.count():
            if done.wait(0.02):
                return
            store.write(run_lock.LOCK, run_lock._encoded(dataclasses.replace(holder, beat=beat))).result()

    alive = threading.Thread(target=live)
    alive.start()
    with pytest.raises(ValueError, match="a run on far "), run_lock.locked(workdir):
        pytest.fail("two runs at once")
    done.set()
    alive.join()
    with run_lock.locked(workdir):  # no beat any more
        pass


def test_a_run_that_was_taken_for_dead_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_BEAT_SECONDS", 0.02)
    ended = threading.Event()
    lines = []

    def abort(error):
        lines.append(str(error))
        ended.set()
        raise OSError  # in place of the end of this process

    monkeypatch.setattr(failures, "abort", abort)
    with run_lock.locked(str(tmp_path)):
        _leave(str(tmp_path), host="far")
        assert ended.wait(10)
    assert lines[0].startswith("a run on far has taken") and (tmp_path / run_lock.LOCK).exists()


def test_what_was_written_by_hand_does_not_stop_a_run(tmp_path, quick):
    (tmp_path / run_lock.LOCK).write_text("{}")
    with run_lock.locked(str(tmp_path)):
        pass
    assert not (tmp_path / run_lock.LOCK).exists()
    with run_lock.locked(str(tmp_path / "new")):
        pass
    assert not (tmp_path / "new").exists()  # nothing came of it
