"""What befalls a run, done to it from outside: signals, damaged files, a full disk. Nothing in `if_jax` knows of it.

Each fault is a function of a running `Run` and a seeded generator; it returns once the harm is done.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from supervised import Run

SLOW_SECONDS = 4.0  # a pause that the deadline of a step forgives


def killed(run: Run, rng: Random) -> None:
    os.kill(_any(run, rng), signal.SIGKILL)


def told_to_end(run: Run, rng: Random) -> None:
    os.kill(_any(run, rng), signal.SIGTERM)


def stopped(run: Run, rng: Random) -> None:
    """Neither dead nor alive: only a deadline notices."""
    os.kill(_any(run, rng), signal.SIGSTOP)


def slow_host(run: Run, rng: Random) -> None:
    pid = _any(run, rng)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(SLOW_SECONDS)
    os.kill(pid, signal.SIGCONT)


def killed_while_saving(run: Run, rng: Random) -> None:
    _poll(run, lambda: any("tmp" in path.name for path in _entries(run.checkpoints)), "saves a checkpoint")
    _kill_all(run)


def killed_while_restoring(run: Run, rng: Random) -> None:
    before = set(run.processes().values())
    _kill_all(run)
    restoring: list[int] = []

    def restores() -> bool:
        restoring[:] = [pid for pid in run.processes().values() if pid not in before and _reads(pid, run.checkpoints)]
        return bool(restoring)

    _poll(run, restores, "reads a checkpoint")
    os.kill(restoring[0], signal.SIGKILL)


def truncated_file(run: Run, rng: Random) -> None:
    path = _end_beside_a_sealed_checkpoint(run)
    os.truncate(path, rng.randrange(path.stat().st_size))


def flipped_byte(run: Run, rng: Random) -> None:
    path = _end_beside_a_sealed_checkpoint(run)
    with path.open("r+b") as file:
        at = rng.randrange(path.stat().st_size)
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << rng.randrange(8)]))


def full_disk(run: Run, rng: Random) -> None:
    """Process 0, which writes what all share, can make no file longer from now on; its successor can."""
    pid = run.processes()[0]
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
    _poll(run, lambda: run.processes().get(0) != pid, "leaves for want of room")


FAULTS: tuple[Callable[[Run, Random], None], ...] = (
    killed,
    flipped_byte,
    killed_while_saving,
    stopped,
    full_disk,
    told_to_end,
    killed_while_restoring,
    truncated_file,
    slow_host,
)


def _any(run: Run, rng: Random) -> int:
    return rng.choice(sorted(run.processes().values()))


def _kill_all(run: Run) -> None:
    for pid in run.processes().values():
        os.kill(pid, signal.SIGKILL)


def _end_beside_a_sealed_checkpoint(run: Run) -> Path:
    """Kills the run where its newest checkpoint is sealed and another stands behind it; the newest's longest file."""
    newest: list[Path] = []

    def sealed() -> bool:
        entries = list(_entries(run.checkpoints))
        complete = sorted((path for path in entries if path.name.isdigit()), key=lambda path: int(path.name))
        newest[:] = complete[-1:]
        quiet = all(path.name.isdigit() or path.name.endswith(".damaged") for path in entries)
        return len(complete) > 1 and quiet and (newest[0] / "sha256.json").exists()

    _poll(run, sealed, "seals a checkpoint")
    _kill_all(run)
    files = (path for path in newest[0].rglob("*") if path.is_file() and path.name != "sha256.json")
    return max(files, key=lambda path: path.stat().st_size)


def _entries(folder: Path) -> Iterator[Path]:
    yield from folder.iterdir() if folder.exists() else ()


def _reads(pid: int, folder: Path) -> bool:
    try:
        return any(os.readlink(link).startswith(str(folder)) for link in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:  # it ended, or closed a file, while we looked
        return False


def _poll(run: Run, happens: Callable[[], bool], what: str, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not happens():
        if time.monotonic() > end:
            raise TimeoutError(f"the run never {what}: see {run.log}")
        time.sleep(0.001)
