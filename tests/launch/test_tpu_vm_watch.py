"""launch/tpu_vm/watch.sh: a run that is brought to its end whatever becomes of the slice."""

from __future__ import annotations

import pytest
import tpu_cloud
from tpu_cloud import COSTS, error_of

origin, cloud = tpu_cloud.origin, tpu_cloud.cloud


def test_watch_does_everything_and_deletes_at_the_end(cloud):
    cloud.plan("0")
    done = cloud("watch", "--delete")
    assert done.returncode == 0, done.stderr
    assert "has ended well on all 4 worker(s)" in done.stderr and cloud.state() == {}
    assert cloud.starts() == [cloud.commits[0]]


def test_watch_replaces_a_preempted_slice_and_resumes_with_the_same_commit(cloud):
    """Taken away in mid-run (which is also: while saving), and once more during the set-up that follows."""
    for name, commit in zip(("rev", "next"), cloud.commits, strict=True):
        (cloud.folder / name).write_text(commit)
    cloud.settings(REV='$(cat "$CLOUD/rev")')
    cloud.plan("runs", "0")
    cloud.events("tpu-vm ssh 7 suspend_node", "tpu-vm ssh 8 preempt")
    done = cloud("watch")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("replacing the slice") == 2
    assert cloud.calls().count("queued-resources create") == 3
    assert [cloud.starts(worker) for worker in range(4)] == [[cloud.commits[0]] * 2] * 4
    assert COSTS in done.stderr


def test_watch_waits_for_a_repair_and_does_not_replace(cloud):
    cloud.plan("runs", "0")
    cloud.events("tpu-vm ssh 6 reboot 2", "tpu-vm describe 8 repair", "tpu-vm describe 10 ready")
    done = cloud("watch")
    assert done.returncode == 0, done.stderr
    assert "the TPU is REPAIRING" in done.stderr and "was started again: starting all processes again" in done.stderr
    assert cloud.calls().count("queued-resources create") == 1 and len(cloud.starts()) == 2


def test_watch_replaces_a_slice_with_a_lost_worker(cloud):
    cloud.plan("runs", "0")
    cloud.events("tpu-vm ssh 7 lose 3")
    done = cloud("watch")
    assert done.returncode == 0, done.stderr
    assert "worker(s) 3 of 4 do not answer (5 of 5)" in done.stderr
    assert "worker(s) 3 no longer answer: replacing the slice" in done.stderr
    assert cloud.calls().count("queued-resources create") == 2 and cloud.calls().count("queued-resources delete") == 1


def test_watch_waits_for_a_worker_that_comes_back(cloud):
    cloud.plan("0")
    cloud.set_up()
    cloud.events("tpu-vm ssh 6 lose 3", "tpu-vm ssh 8 find 3")
    done = cloud("watch")
    assert done.returncode == 0 and cloud.calls().count("queued-resources delete") == 0, done.stderr


def test_watch_never_deletes_what_it_never_reached(cloud):
    cloud.set_up()
    cloud.events("tpu-vm ssh 1 lose 0")
    done = cloud("watch")
    assert "worker(s) 0 of 4 never answered: check ssh" in error_of(done) and COSTS in done.stderr
    assert "queued-resources delete" not in cloud.calls()


@pytest.mark.parametrize("codes", ["76 75 75 75", "143", "137 75 0 1", "77 0 77 77"])
def test_watch_starts_all_again_when_a_process_is_lost(cloud, codes):
    cloud.plan(codes, "0")
    cloud.set_up()
    done = cloud("watch")
    assert done.returncode == 0, done.stderr
    assert "starting all processes again" in done.stderr
    assert [len(cloud.starts(worker)) for worker in range(4)] == [2] * 4


@pytest.mark.parametrize(("codes", "worker"), [("2", 0), ("75 75 1 75", 2)])
def test_watch_does_not_repeat_a_mistake(cloud, codes, worker):
    cloud.plan(codes)
    cloud.set_up()
    done = cloud("watch")
    assert f"ended with a mistake, worker {worker}: ended" in error_of(done)
    assert COSTS in done.stderr and len(cloud.starts()) == 1


def test_watch_ends_the_others_when_they_do_not_leave(cloud):
    cloud.set_up()
    cloud.plan("75 runs runs runs", "0")
    done = cloud("watch")
    assert done.returncode == 0 and "waiting for the other workers to leave" in done.stderr, done.stderr


def test_watch_gives_up_on_a_run_that_never_gets_going(cloud):
    cloud.set_up()
    cloud.plan(*["75"] * 9)
    done = cloud("watch")
    assert "ended five times within ten minutes" in error_of(done) and COSTS in done.stderr
    assert len(cloud.starts()) == 5


def test_watch_gives_up_on_refusals_and_on_a_setup_that_fails(cloud):
    cloud.events(*(f"queued-resources create {number} quota" for number in (1, 2, 3)))
    done = cloud("watch")
    assert "the slice was refused three times" in done.stderr and "nothing runs that costs money" in done.stderr
    cloud.events()
    (cloud.folder / "fail").write_text("1")
    done = cloud("watch")
    assert done.returncode == 1 and "setup failed three times" in done.stderr and COSTS in done.stderr


def test_watch_survives_its_own_lost_connection(cloud):
    cloud.plan("0")
    cloud.events("queued-resources describe 2 offline", "queued-resources describe 8 offline")
    done = cloud("watch")
    assert "queued-resources delete" not in cloud.calls() and done.returncode == 0, done.stderr
