"""Where a run's time goes: the account of synthetic sessions, what kills and full disks leave, the best interval."""

from __future__ import annotations

import errno
import itertools
import json

import numpy as np
import pytest
from click.testing import CliRunner

from if_jax.cli import main
from if_jax.tracking import goodput

FAULTLESS = [
    ("start", 0, {}),
    ("initialized", 5, {}),
    ("prepared", 7, {}),
    ("checked", 8, {"step": 0}),
    ("prepared", 10, {}),
    ("compiled", 40, {}),
    ("steps", 60, {"step": 10, "data": 2.0}),
    ("saved", 61, {"step": 10}),
]
# Killed at 82, ten seconds of steps after its checkpoint; another begins at 90 and goes on from step 10.
KILLED = [*FAULTLESS, ("steps", 81, {"step": 20, "data": 1.0})]
RESUMED = [
    ("start", 90, {}),
    ("initialized", 93, {}),
    ("checked", 94, {"step": 10}),
    ("restored", 97, {}),
    ("compiled", 99, {}),
    ("steps", 119, {"step": 20, "data": 0.0}),
    ("watched", 122, {}),
    ("saved", 124, {"step": 20}),
    ("end", 125, {"why": "finished"}),
]


def _events(*rows):
    return [{"time": float(when), "event": event, **values} for event, when, values in rows]


def _adds_up(account):
    assert account.total == pytest.approx(account.productive + sum(account.badput.values()))
    assert min(account.badput.values()) >= 0
    return {name: round(took, 6) for name, took in account.badput.items() if took}


def test_a_session_alone():
    account = goodput.account(_events(*FAULTLESS))
    assert _adds_up(account) == {
        "tpu_initialization": 5,
        "training_prep": 4,
        "unproductive_checkpoint_restore_time": 1,
        "program_startup": 30,
        "data_loading_sync": 2,
        "unproductive_checkpoint_save_time": 1,
    }
    assert account.total == 61 and account.productive == 18 and account.goodput == pytest.approx(18 / 61)
    assert (account.step, account.sessions, account.disruptions, account.saves) == (10, 1, 0, 1)


def test_steps_done_again_were_lost_and_a_gap_is_recovery():
    account = goodput.account(_events(*KILLED, *RESUMED))
    badput = _adds_up(account)
    assert account.total == 125
    assert badput["wasted_progress_from_disruption"] == 19  # steps 11-20 of the first session, without its data
    assert badput["infrastructure_recovery_from_disruption"] == 9
    assert badput["custom_badput_events"] == 3 and badput["other"] == 1
    assert badput["unproductive_checkpoint_restore_time"] == 1 + 1 + 3
    assert account.productive == 18 + 20 and (account.step, account.disruptions) == (20, 1)
    assert account.restart == 99 - 81 and account.blocking_save == 1.5


def test_a_window_is_lost_in_part():
    """Steps 1-10 in one line, gone on from step 4: six tenths of it."""
    account = goodput.account(_events(*FAULTLESS, ("start", 61, {}), ("checked", 61, {"step": 4})))
    assert account.badput["wasted_progress_from_disruption"] == pytest.approx(0.6 * 18)


def test_the_earliest_of_later_origins_counts():
    """The second session went back to 10, the third to 0: nothing of the first remains, nor of the second."""
    third = [("start", 130, {}), ("checked", 131, {"step": 0}), ("steps", 140, {"step": 3, "data": 0})]
    account = goodput.account(_events(*KILLED, *RESUMED[:-1], *third))
    assert account.productive == 9 and account.badput["wasted_progress_from_disruption"] == 18 + 19 + 20
    _adds_up(account)


def test_a_session_killed_before_it_knew_its_step_loses_nothing_of_others():
    early = [("start", 85, {}), ("initialized", 88, {})]
    account = goodput.account(_events(*KILLED, *early, *RESUMED))
    assert account.badput["infrastructure_recovery_from_disruption"] == 4 + 2
    assert account.disruptions == 2 and account.restart == 99 - 88
    _adds_up(account)


def test_a_pause_after_the_end_is_no_part_of_the_run():
    later = [("start", 1000, {}), ("checked", 1001, {"step": 20}), ("steps", 1011, {"step": 30, "data": 0})]
    account = goodput.account(_events(*FAULTLESS, ("end", 61, {"why": "finished"}), *later))
    assert account.total == 61 + 11 and account.disruptions == 0
    assert goodput.account(_events(*FAULTLESS, ("end", 61, {"why": "Terminated"}), *later)).total == 1011


def test_a_clock_that_is_set_back_counts_nothing_twice():
    account = goodput.account(
        _events(*KILLED, ("start", 70, {}), ("checked", 75, {"step": 10}), ("end", 90, {"why": ""}))
    )
    assert account.total == 90
    _adds_up(account)


def test_nothing_yet():
    account = goodput.account([])
    assert (account.total, account.goodput, account.sessions) == (0, 0, 0)


def _record(workdir, steps):
    recorder = goodput.Recorder()
    recorder.note("checked", step=0)
    recorder.open(str(workdir))
    for step in steps:
        recorder.waited(0.25)
        recorder.stepped(step, due=step % 2 == 0)
    return recorder


def _kill(recorder):
    """What the end of its process does to it."""
    recorder._file.close()


def test_lines_are_there_at_once_and_a_torn_one_is_left_out(tmp_path):
    _kill(_record(tmp_path, range(1, 6)))
    path = tmp_path / goodput.FILE
    names = [event["event"] for event in goodput.read_events(str(tmp_path))]
    assert names == ["start", "checked", "steps", "steps"]  # the fifth step is not due
    assert [event["data"] for event in goodput.read_events(str(tmp_path)) if "data" in event] == [0.5, 0.5]
    path.write_bytes(path.read_bytes()[:-9])  # in the middle of the last line
    recorder = _record(tmp_path, [6])
    with recorder.during("saved", step=6):
        pass
    _kill(recorder)
    events = goodput.read_events(str(tmp_path))
    assert [event["event"] for event in events] == ["start", "checked", "steps", "start", "checked", "steps", "saved"]
    _adds_up(goodput.account(events))


def test_steps_before_a_save_are_told_apart_from_it(tmp_path):
    recorder = _record(tmp_path, [])
    recorder.stepped(3)
    with recorder.during("saved", step=3):
        pass
    recorder.close("finished")
    rows = goodput.read_events(str(tmp_path))
    assert [(row["event"], row.get("step")) for row in rows[2:]] == [("steps", 3), ("saved", 3), ("end", None)]


def test_long_windows_are_written_in_between(tmp_path, monkeypatch):
    clock = itertools.count(0, 6)
    monkeypatch.setattr(goodput.time, "monotonic", lambda: next(clock))
    recorder = _record(tmp_path, [])
    for step in range(1, 7):
        recorder.stepped(step)
    _kill(recorder)
    steps = [row["step"] for row in goodput.read_events(str(tmp_path)) if row["event"] == "steps"]
    assert steps and len(steps) < 6


class _Full:
    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_said_once_and_stops_nothing(tmp_path, caplog):
    recorder = _record(tmp_path, [])
    file, recorder._file = recorder._file, _Full()
    for step in (2, 4, 6):
        recorder.stepped(step, due=True)
    recorder._file = file
    recorder.stepped(8, due=True)
    recorder.close("finished")
    assert caplog.text.count("goodput.jsonl is not complete") == 1
    assert [row.get("step") for row in goodput.read_events(str(tmp_path))] == [None, 0, 8, None]


def test_where_nothing_can_be_appended_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for workdir in ("gs://bucket/run", "file", None):  # said, not raised; None: another process keeps it
        recorder = goodput.Recorder()
        with recorder.into(workdir):
            recorder.stepped(2, due=True)
            assert not recorder._waiting  # nothing is piled up
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == ""


def test_a_session_ends_by_the_name_of_what_ended_it(tmp_path):
    with goodput.Recorder().into(str(tmp_path)):
        pass
    with pytest.raises(KeyboardInterrupt), goodput.Recorder(began=1.0).into(str(tmp_path)):
        raise KeyboardInterrupt
    events = goodput.read_events(str(tmp_path))
    assert [event.get("why") for event in events] == [None, "finished", None, "KeyboardInterrupt"]
    assert events[2]["time"] == 1.0 and goodput.account(events).disruptions == 0


@pytest.mark.parametrize(("save", "restart", "between"), [(0.5, 60, 10800), (30, 300, 10800), (10, 0, 600)])
def test_the_best_interval_is_the_best(save, restart, between):
    interval, share = goodput.best_interval(save, restart, between)
    grid = np.geomspace(interval / 10, interval * 10, 4001)
    shares = [goodput.expected_goodput(each, save, restart, between) for each in grid]
    assert grid[int(np.argmax(shares))] == pytest.approx(interval, rel=0.03)
    assert max(shares) == pytest.approx(share, rel=1e-3) and 0 < share < 1


def test_the_expected_goodput_is_what_random_faults_leave():
    """Simulated: exponential faults, each costing the work since the last save and a restart."""
    rng, save, restart, between, interval = np.random.default_rng(0), 20.0, 50.0, 1000.0, 150.0
    wall = done = 0.0
    while done < 2e6:
        needed, fault = interval + save, rng.exponential(between)
        while fault < needed:  # in the segment; then in restarts until one is through
            wall += fault
            while (again := rng.exponential(between)) < restart:
                wall += again
            wall, fault = wall + restart, rng.exponential(between)
        wall, done = wall + needed, done + interval
    assert done / wall == pytest.approx(goodput.expected_goodput(interval, save, restart, between), rel=0.01)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="save 0 s"):
        goodput.best_interval(0, 10, 100)
    assert goodput.best_interval(300, 10, 100)[0] == 100


def test_the_command_prints_a_table_or_json(tmp_path):
    rows = "".join(json.dumps(event) + "\n" for event in _events(*KILLED, *RESUMED))
    (tmp_path / goodput.FILE).write_text(rows)
    result = CliRunner().invoke(main, ["goodput", str(tmp_path)])
    assert result.exit_code == 0 and "wasted_progress_from_disruption" in result.output and "30.40 %" in result.output
    assert "1 disruption(s): a restart took 18.0 s; 2 save(s) blocked for 1.50 s each" in result.output
    values = json.loads(CliRunner().invoke(main, ["goodput", str(tmp_path), "--json"]).output)
    assert values["goodput"] == pytest.approx(38 / 125) and values["expected_goodput"] > 0.9
    missing = CliRunner().invoke(main, ["goodput", str(tmp_path / "none")])
    assert missing.exit_code == 1 and "does not exist" in missing.output and missing.output.count("\n") == 1
