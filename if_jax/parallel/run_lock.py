"""One run at a time in a folder: `run.lock` says who works there, refuses a second run, and outlives no dead one.

It is written with conditional writes, on a disk and in a bucket alike, so that of two runs that come at once only one
gets it. Whether its holder lives is seen at its process on the same machine, and elsewhere at the lock itself, which is
written anew every few seconds.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import psutil
import tensorstore
from absl import logging

from if_jax.parallel import failures

LOCK = "run.lock"
_BEAT_SECONDS = 10.0  # between writes
STALE_SECONDS = 60.0  # without one, after which a run on another machine counts as dead
_POLL_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who works in a folder."""

    host: str
    machine: str  # tells whether `process` is a number of this machine, since its start, and of this container
    process: int
    process_start: float  # seconds since 1970: a number is used again
    since: str  # when the run began, for people
    token: str  # another one for each run
    beat: int = 0


@contextmanager
def locked(workdir: str, remedy: str = "let it end, or use another --workdir") -> Iterator[None]:
    """Holds the lock of a folder.

    Args:
      workdir: the folder, on a disk or in a bucket; it is made where it is missing.
      remedy: what a second run is to do.

    Raises:
      ValueError: another run is at work there.
      PermissionError, OSError: the lock cannot be written.
    """
    fresh = "://" not in workdir and not Path(workdir).exists()
    with _in_words(workdir):
        store = _open(workdir)
        holder = _this_process()
        generation = [_take(store, holder, workdir, remedy)]
    done = threading.Event()

    def renew() -> None:
        beat = holder
        while not done.wait(_BEAT_SECONDS):
            beat = dataclasses.replace(beat, beat=beat.beat + 1)
            try:
                generation[0] = _renew(store, beat, generation[0], workdir)
            except OSError as error:  # a full disk, a bucket that does not answer: no reason to end the run
                logging.info("the lock of %s was not renewed: %s", workdir, error)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with suppress(Exception):  # it will be stale
            store.write(LOCK, None, if_equal=generation[0]).result()
            if fresh:
                Path(workdir).rmdir()  # where nothing came of the run


def is_at_work(workdir: str) -> bool:
    """Whether a run trains in a folder now. Of one on another machine a sign of life is waited for.

    Args:
      workdir: the folder, on a disk or in a bucket.
    """
    if "://" not in workdir and not Path(workdir).is_dir():
        return False
    with _in_words(workdir):
        store = _open(workdir)
        there = store.read(LOCK).result()
        if there.state != "value":
            return False
        holder = _decoded(there.value)
        if holder and holder.machine == _machine():
            return _lives(holder)
        end = time.monotonic() + STALE_SECONDS
        while time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
            now = store.read(LOCK).result()
            if now.state != "value" or now.stamp.generation != there.stamp.generation:
                return now.state == "value"
        return False


def _take(store: tensorstore.KvStore, own: Holder, workdir: str, remedy: str) -> bytes:
    """Writes the lock; its generation."""
    while True:
        there = store.read(LOCK).result()
        if there.state == "value":
            _require_stale(store, there, workdir, remedy)
        written = store.write(LOCK, _encoded(own), if_equal=there.stamp.generation).result()
        if written.generation:  # else another run was quicker: look again
            return written.generation


def _require_stale(store: tensorstore.KvStore, there: Any, workdir: str, remedy: str) -> None:
    """Returns once the holder of a lock is known to be dead, or has let go; ValueError where it lives."""
    holder = _decoded(there.value)
    if holder and holder.machine == _machine():
        if _lives(holder):
            _refuse(holder, workdir, remedy)
        logging.warning("the run of process %d in %s is gone: going on from it", holder.process, workdir)
        return
    name = holder.host if holder else "another machine"
    logging.warning("a run on %s holds the lock of %s: looking for %g s whether it lives", name, workdir, STALE_SECONDS)
    end = time.monotonic() + STALE_SECONDS
    while time.monotonic() < end:
        time.sleep(_POLL_SECONDS)
        now = store.read(LOCK).result()
        if now.state != "value":
            return
        if now.stamp.generation != there.stamp.generation:
            _refuse(_decoded(now.value), workdir, remedy)
    logging.warning("the run on %s is gone: going on from it", name)


def _refuse(holder: Holder | None, workdir: str, remedy: str) -> NoReturn:
    who = f"on {holder.host} (process {holder.process}, since {holder.since})" if holder else "on another machine"
    raise ValueError(f"a run {who} is at work in {workdir}: {remedy}")


def _renew(store: tensorstore.KvStore, own: Holder, generation: bytes, workdir: str) -> bytes:
    """Writes the lock anew; its generation. Ends this process where another run has taken it over."""
    with _in_words(workdir):
        written = store.write(LOCK, _encoded(own), if_equal=generation).result()
        if written.generation:
            return written.generation
        there = store.read(LOCK).result()
        holder = _decoded(there.value) if there.state == "value" else own
        if holder and holder.token == own.token:  # written, though the answer was lost; or removed by hand
            return store.write(LOCK, _encoded(own), if_equal=there.stamp.generation).result().generation
    name = holder.host if holder else "another machine"
    failures.abort(ValueError(f"a run on {name} has taken {workdir} over, since this one gave no sign of life"))


def _this_process() -> Holder:
    process = psutil.Process()
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    token = uuid.uuid4().hex
    return Holder(socket.gethostname(), _machine(), process.pid, process.create_time(), since, token)


def _machine() -> str:
    """Names what process numbers are counted in: this machine since it was started, and the container."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _lives(holder: Holder) -> bool:
    try:
        process = psutil.Process(holder.process)
        gone = process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        return not gone and abs(process.create_time() - holder.process_start) < 2.0
    except psutil.NoSuchProcess:
        return False


def _encoded(holder: Holder) -> bytes:
    return json.dumps(dataclasses.asdict(holder)).encode()


def _decoded(content: bytes) -> Holder | None:
    try:
        return Holder(**json.loads(content))
    except (ValueError, TypeError):
        return None  # of another version, or written by hand


def _open(workdir: str) -> tensorstore.KvStore:
    if "://" in workdir:
        return tensorstore.KvStore.open(f"{workdir.rstrip('/')}/").result()
    folder = Path(workdir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return tensorstore.KvStore.open({"driver": "file", "path": f"{folder}/"}).result()


@contextmanager
def _in_words(workdir: str) -> Iterator[None]:
    """What TensorStore raises, whatever its status says, as the errors that Python has for it."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM):
            raise
        raise _no_permission(workdir) from None
    except Exception as error:
        line = " ".join(str(error).split())
        if "PERMISSION_DENIED" in line or "UNAUTHENTICATED" in line:
            raise _no_permission(workdir) from None
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            if os.strerror(number) in line:
                raise OSError(number, os.strerror(number), workdir) from None
        if isinstance(error, ValueError) and f" is at work in {workdir}" in line:
            raise
        raise OSError(errno.EIO, f"{LOCK} cannot be written ({line[:200]})", workdir) from error


def _no_permission(workdir: str) -> PermissionError:
    return PermissionError(f"{workdir}: no permission; train as the user who owns it, or change its mode")
