"""Where a run's wall-clock time goes: a line in `WORKDIR/goodput.jsonl` whenever one kind of work gives way to another.

Each line says what was done since the line before, so the kinds add up to the whole. Restarts append to the same file;
`account` reads it. The kinds of lost time bear the names of ml-goodput (BadputType of ml-goodput-measurement).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from absl import logging

FILE = "goodput.jsonl"
# What the time before a line was lost to. Besides there are `steps`: productive work, and waiting for data.
_KINDS = {
    "initialized": "tpu_initialization",  # interpreter, imports, the other processes, devices
    "prepared": "training_prep",  # text encoder, data source, first weights
    "checked": "unproductive_checkpoint_restore_time",  # checksums
    "restored": "unproductive_checkpoint_restore_time",
    "compiled": "program_startup",
    "saved": "unproductive_checkpoint_save_time",  # what blocks training; the rest is written beside it
    "watched": "custom_badput_events",  # validation and samples
}
_DATA, _LOST = "data_loading_sync", "wasted_progress_from_disruption"
_RECOVERY, _OTHER = "infrastructure_recovery_from_disruption", "other"
BADPUT = tuple(dict.fromkeys([*_KINDS.values(), _DATA, _LOST, _RECOVERY, _OTHER]))
_EVERY = 10.0  # seconds between lines of steps at most: so much is unknown of what a killed process did last


def process_start() -> float:
    """Wall-clock time at which this process began, seconds since 1970."""
    return psutil.Process().create_time()


class Recorder:
    """Appends the lines of one session; silent until `into`, and never in the way of training.

    A line is one unbuffered write, so a kill costs at most the line it cuts off. What cannot be written (a full disk)
    is said once and counted as part of what comes next.
    """

    def __init__(self, began: float | None = None) -> None:
        """began: when this session's work began, seconds since 1970; now, unless given."""
        self._file: Any = None
        self._torn = self._warned = False
        self._waiting: list[dict[str, Any]] | None = []  # lines from before `into`
        self._step, self._data, self._last = 0, 0.0, 0.0
        self._write("start", time.time() if began is None else began, pid=os.getpid())

    @contextmanager
    def into(self, workdir: str | None) -> Iterator[None]:
        """`open` and `close` around the rest of a session; None: of a process whose time is not kept."""
        if workdir is not None:
            self.open(workdir)
        self._waiting = None
        try:
            yield
        except BaseException as error:
            self.close(type(error).__name__)
            raise
        self.close("finished")

    def open(self, workdir: str) -> None:
        """Begins to write, the lines until now first. Object stores cannot append: there nothing is kept."""
        if "://" in workdir:
            logging.info("%s cannot be appended to: no %s is kept", workdir, FILE)
            return
        path = Path(workdir) / FILE
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b", buffering=0)
            if self._file.seek(0, os.SEEK_END):
                self._file.seek(-1, os.SEEK_END)
                self._torn = self._file.read(1) != b"\n"
        except OSError as error:
            self._complain(error)
            return
        for line in self._waiting or ():
            self._append(line)

    def note(self, event: str, **values: Any) -> None:
        """Writes what was done since the line before, with values that go into its line."""
        self._flush()
        self._write(event, **values)

    @contextmanager
    def during(self, event: str, **values: Any) -> Iterator[None]:
        """Notes what the block does, apart from the steps before it."""
        self._flush()
        yield
        self._write(event, **values)

    def waited(self, seconds: float) -> None:
        """Counts time in which the devices had nothing to do but wait for a batch."""
        self._data += seconds

    def stepped(self, step: int, due: bool = False) -> None:
        """Counts a step that is done; written when `due`, and every ten seconds."""
        self._step = step
        if due or time.monotonic() - self._last > _EVERY:
            self._flush()

    def close(self, reason: str) -> None:
        """Ends the session: "finished", or the name of what ended it."""
        self.note("end", why=reason)
        if self._file is not None:
            self._file.close()
            self._file = None

    def _flush(self) -> None:
        if self._step:
            self._write("steps", step=self._step, data=round(self._data, 3))
            self._step, self._data = 0, 0.0

    def _write(self, event: str, when: float | None = None, **values: Any) -> None:
        self._last = time.monotonic()
        line = {"time": round(time.time() if when is None else when, 3), "event": event, **values}
        if self._file is not None:
            self._append(line)
        elif self._waiting is not None:
            self._waiting.append(line)

    def _append(self, line: dict[str, Any]) -> None:
        data = (b"\n" if self._torn else b"") + json.dumps(line).encode() + b"\n"
        try:
            self._torn = self._file.write(data) != len(data)
        except OSError as error:
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        if not self._warned:
            logging.warning("%s is not complete: %s", FILE, error)
            self._warned = True


@dataclasses.dataclass(frozen=True)
class Account:
    """Where a run's time went, seconds; `productive` and `badput` add up to `total`."""

    total: float
    productive: float
    badput: dict[str, float]  # by the names of `BADPUT`
    step: int  # the newest one that is not lost
    sessions: int
    disruptions: int  # sessions after one that did not finish
    saves: int
    blocking_save: float  # mean time a save keeps training waiting
    restart: float  # mean time from the last sign of a disrupted session to the first new step

    @property
    def goodput(self) -> float:
        """The share of the time that went into steps which count."""
        return self.productive / self.total if self.total else 0.0


def read_events(workdir: str) -> list[dict[str, Any]]:
    """The lines of `WORKDIR/goodput.jsonl`; what a kill has cut off is left out.

    Raises:
      FileNotFoundError: the run has none.
    """
    path = Path(workdir) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the local --workdir of a run that has begun to train")
    events = []
    for line in path.read_bytes().splitlines():
        try:
            event = json.loads(line)
            events.append(event | {"time": float(event["time"]), "event": str(event["event"])})
        except (ValueError, TypeError, KeyError):
            continue
    return events


def account(events: Iterable[Mapping[str, Any]]) -> Account:
    """Adds up where the time went.

    A step that a later session did again, since it went on from an earlier checkpoint, is lost: its time is wasted
    progress. From the last line of a session that did not finish to the start of the next it is recovery (what a killed
    process did after its last line included); a pause after a finished session is no part of the run.
    """
    sessions = _sessions(events)
    badput = dict.fromkeys(BADPUT, 0.0)
    productive, step, kept, saves = 0.0, 0, math.inf, []
    for index, event, seconds in _intervals(sessions):
        kind = event["event"]
        if kind == "start":
            badput[_RECOVERY] += seconds
            kept = _kept(sessions[index + 1 :])
        elif kind == "steps":
            waited, to = min(float(event.get("data", 0.0)), seconds), int(event["step"])
            lost = min(max(to - max(step, kept), 0.0) / (to - step), 1.0) if to > step else 0.0
            badput[_DATA] += waited
            badput[_LOST] += lost * (seconds - waited)
            productive += (1.0 - lost) * (seconds - waited)
            step = to
        else:
            badput[_KINDS.get(kind, _OTHER)] += seconds
            step = int(event["step"]) if kind == "checked" else step
            saves += [seconds] if kind == "saved" and "step" in event else []
    restarts = _restarts(sessions)
    return Account(
        total=productive + sum(badput.values()),
        productive=productive,
        badput=badput,
        step=step,
        sessions=len(sessions),
        disruptions=sum(not _finished(session) for session in sessions[:-1]),
        saves=len(saves),
        blocking_save=sum(saves) / len(saves) if saves else 0.0,
        restart=sum(restarts) / len(restarts) if restarts else 0.0,
    )


def best_interval(save: float, restart: float, between_faults: float) -> tuple[float, float]:
    """When to save, and the goodput to expect then: (seconds of training between saves, share of the time).

    The interval is Young's √(2·save·between_faults) with the higher-order correction of J. T. Daly (Future Generation
    Computer Systems 22, 2006), the share his model of faults that come at random.

    Args:
      save: seconds that a save keeps training waiting.
      restart: seconds from a fault to the first new step.
      between_faults: seconds between faults on average.

    Raises:
      ValueError: one of them cannot be.
    """
    if save <= 0 or restart < 0 or between_faults <= 0:
        raise ValueError(
            f"save {save:g} s, restart {restart:g} s, {between_faults:g} s between faults: the first and the last must "
            "be above 0"
        )
    ratio = save / (2 * between_faults)
    interval = between_faults
    if ratio < 1:
        interval = math.sqrt(2 * save * between_faults) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save
    return interval, expected_goodput(interval, save, restart, between_faults)


def expected_goodput(interval: float, save: float, restart: float, between_faults: float) -> float:
    """The share of productive time when saving every `interval` seconds of training (Daly's model)."""
    wall = between_faults * math.exp(restart / between_faults) * math.expm1((interval + save) / between_faults)
    return interval / wall


def report(account: Account, between_faults: float) -> dict[str, Any]:
    """An account as JSON values, with the interval between saves to advise where saving was measured.

    Args:
      account: of a run.
      between_faults: seconds between faults on average.
    """
    values = {"goodput": account.goodput, **dataclasses.asdict(account)}
    if account.blocking_save > 0:
        interval, share = best_interval(account.blocking_save, account.restart, between_faults)
        values |= {"between_faults": between_faults, "best_interval": interval, "expected_goodput": share}
    return values


def table(values: Mapping[str, Any]) -> str:
    """A report in a few lines, the largest loss first."""
    total = values["total"] or 1.0
    rows = [("productive", values["productive"])]
    rows += sorted(((name, took) for name, took in values["badput"].items() if took), key=lambda row: -row[1])
    lines = [
        f"{name:42}{took:12.1f} s{100 * took / total:8.2f} %" for name, took in [*rows, ("total", values["total"])]
    ]
    lines.append(
        f"step {values['step']}, {values['sessions']} session(s), {values['disruptions']} disruption(s): a restart "
        f"took {values['restart']:.1f} s; {values['saves']} save(s) blocked for {values['blocking_save']:.2f} s each"
    )
    if "best_interval" in values:
        lines.append(
            f"at a fault every {values['between_faults'] / 3600:g} h: save every {values['best_interval']:.0f} s for a "
            f"goodput of {100 * values['expected_goodput']:.1f} %"
        )
    return "\n".join(lines)


def _sessions(events: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    sessions: list[list[Mapping[str, Any]]] = []
    for event in events:
        if event["event"] == "start" or not sessions:
            sessions.append([])
        sessions[-1].append(event)
    return sessions


def _intervals(sessions: list[list[Mapping[str, Any]]]) -> Iterator[tuple[int, Mapping[str, Any], float]]:
    """Every line with its session's number and the seconds since the line before; a clock set back counts nothing."""
    cursor: float | None = None
    for index, session in enumerate(sessions):
        if index and _finished(sessions[index - 1]):
            cursor = None
        for event in session:
            cursor = event["time"] if cursor is None else cursor
            yield index, event, max(0.0, event["time"] - cursor)
            cursor = max(cursor, event["time"])


def _kept(later: list[list[Mapping[str, Any]]]) -> float:
    """The earliest step that later sessions went on from: what was done beyond it, was done again."""
    resumed = (event["step"] for session in later for event in session if event["event"] == "checked")
    return min(resumed, default=math.inf)


def _restarts(sessions: list[list[Mapping[str, Any]]]) -> list[float]:
    """Seconds from the last line of each disrupted session to where the next began to step."""
    took = []
    for before, session in pairwise(sessions):
        steps = next((i for i, event in enumerate(session) if event["event"] == "steps"), 0)
        if steps and not _finished(before):
            took.append(max(0.0, session[steps - 1]["time"] - before[-1]["time"]))
    return took


def _finished(session: list[Mapping[str, Any]]) -> bool:
    return session[-1]["event"] == "end" and session[-1].get("why") == "finished"
