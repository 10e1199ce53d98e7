"""Several processes as one run: how they find each other, what they must agree on, and how they leave.

A process leaves with a code and a line that say why; a supervisor starts the run again after all but the first three:

    1, 2      a mistake to be mended: the recipe, the data, the command
    130       interrupted by its user
    75        another process of the run was lost
    76        nothing moved for `step_seconds`: another process is stopped, or a device hangs
    77        a process has not come within `start_seconds`
    78        something outside failed that may pass: a disk, a mount, a connection, a bucket, a killed data worker
    143       asked to end (SIGTERM, a preemption notice); the state was saved
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils

from if_jax.parallel import jax_internals, rendezvous

EXIT_PROCESS_LOST, EXIT_STALLED, EXIT_PROCESS_MISSING, EXIT_TRANSIENT = 75, 76, 77, 78
EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143
_LOOK_SECONDS = 5.0  # between looks whether a process that is waited for is alive


class Terminated(Exception):
    """This process was asked to end and has saved its state."""


def connect(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    start_seconds: int,
    heartbeat_seconds: int,
) -> None:
    """Joins the processes of a run, before any other use of JAX; a process that belongs to no others stays alone.

    Args:
      coordinator: "HOST:PORT" of process 0, with `processes` and `process`, for machines that nothing describes; left
        out, JAX reads them from the environment (TPU VM, GKE, Slurm, Open MPI).
      processes: how many there are.
      process: which of them this is, 0 … processes − 1.
      start_seconds: how long to wait for the others.
      heartbeat_seconds: silence after which a process counts as dead and the others leave.

    Raises:
      rendezvous.ProcessMissing: some have not come; it names them.
      ValueError: the three do not stand together, or do not lead to the others.
    """
    check_address(coordinator, processes, process)
    if jax.distributed.is_initialized() or (coordinator is None and jax_internals.is_jax_in_use()):
        return  # whoever started JAX has decided
    address = rendezvous.resolve_address(coordinator, processes, process, start_seconds)
    if address is None or address.processes == 1:  # needs nobody: no name service, no port
        return
    rendezvous.wait_for_all(address, start_seconds)  # JAX ends one that waits in vain with a trace that names nobody
    initialize_jax(coordinator, processes, process, start_seconds=start_seconds, heartbeat_seconds=heartbeat_seconds)


def initialize_jax(
    coordinator: str | None, processes: int | None, process: int | None, *, start_seconds: int, heartbeat_seconds: int
) -> None:
    """The second half of `connect`, for processes that have met: JAX connects them.

    Args:
      coordinator: this and the others as for `connect`.
      processes: likewise.
      process: likewise.
      start_seconds: likewise.
      heartbeat_seconds: likewise.

    Raises:
      ValueError: JAX cannot connect them.
    """
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=start_seconds,
            heartbeat_timeout_seconds=heartbeat_seconds,
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"JAX could not join the processes ({str(error).strip().splitlines()[0]})") from None
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # see `block_on_cpu`


def block_on_cpu(tree: Any) -> Any:
    """`tree`, once it is computed where several processes train on CPUs; elsewhere at once.

    Gloo matches the collectives of two processes by their order, and programs in flight at once have none. A CPU
    program whose inputs are still on their way is in flight even with synchronous dispatch.
    """
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        return jax.block_until_ready(tree)
    return tree


def check_address(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Checks the three options that name a process of a run.

    Raises:
      ValueError: unless all three are there, or none, and the process is one of `processes`.
    """
    options = (coordinator, processes, process)
    if any(value is not None for value in options) and None in options:
        raise ValueError(
            f"coordinator {coordinator}, processes {processes}, process {process}: give all three, or none where the "
            "environment tells them (TPU VM, GKE, Slurm, Open MPI)"
        )
    if processes is not None and process is not None and not 0 <= process < processes:
        raise ValueError(f"process is {process} of {processes}: use 0…{max(processes, 1) - 1}")


def code_hash() -> str:
    """A short SHA-256 of this package's source: what "the same version on every host" means."""
    root, digest = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def require_same_facts(
    facts: Mapping[str, Any], seconds: int = 300, topic: str = "preflight", *, while_alive: bool = False
) -> None:
    """Compares what the processes of a run, of which there are several, are about to train.

    Args:
      facts: of this process, JSON values.
      seconds: how long to wait for the others.
      topic: what they are about; each is compared once.
      while_alive: as for `exchange`.

    Raises:
      ValueError: naming the process and host that differs, and in what.
      rendezvous.ProcessMissing: as `exchange`.
    """
    first, *others = exchange(topic, {"host": socket.gethostname(), **facts}, seconds, while_alive=while_alive)
    for index, other in enumerate(others, start=1):
        if differing := [name for name in facts if other.get(name) != first.get(name)]:
            pairs = "; ".join(f"{name} {other.get(name)!r}, not {first.get(name)!r}" for name in differing)
            raise ValueError(f"process {index} on {other['host']} differs from process 0 on {first['host']}: {pairs}")


def exchange(
    topic: str, payload: Mapping[str, Any], seconds: float, *, while_alive: bool = False
) -> list[dict[str, Any]]:
    """Gives every process the payload of every other, through the coordinator's key-value store.

    Unlike a collective it can say which process has not come.

    Args:
      topic: what it is about; each process may send one payload under it.
      payload: of this process, JSON values.
      seconds: how long to wait for each of the others.
      while_alive: wait longer for one that gives signs of life (`failures.propagated`), as one that still compiles.

    Returns:
      The payloads in the order of the processes.

    Raises:
      rendezvous.ProcessMissing: naming the process that has sent nothing.
    """
    client = jax_internals.coordinator_client()
    client.key_value_set(f"if_jax/{topic}/{jax.process_index()}", json.dumps(payload, sort_keys=True))
    return [_receive(client, topic, index, seconds, while_alive) for index in range(jax.process_count())]


def alive_key(process: int) -> str:
    """Where a process leaves its signs of life at the coordinator, a number that grows."""
    return f"if_jax/alive/{process}"


def _receive(client: Any, topic: str, index: int, seconds: float, while_alive: bool) -> dict[str, Any]:
    signs, end = None, time.monotonic() + seconds
    while True:
        left = end - time.monotonic()
        try:
            wait = min(left, _LOOK_SECONDS) if while_alive else left
            return json.loads(client.blocking_key_value_get(f"if_jax/{topic}/{index}", max(1, int(wait * 1000))))
        except jax.errors.JaxRuntimeError as error:
            try:
                newest = client.key_value_try_get(alive_key(index)) if while_alive else signs
            except jax.errors.JaxRuntimeError:  # it has given none
                newest = signs
            if newest != signs:
                signs, end = newest, time.monotonic() + seconds
            elif time.monotonic() >= end or "DEADLINE_EXCEEDED" not in str(error):
                raise rendezvous.ProcessMissing(rendezvous.missing([index], jax.process_count(), seconds)) from None


@contextmanager
def termination() -> Iterator[Callable[[int], bool]]:
    """Yields `termination_requested(step)`: whether to save and end after a step, for SIGTERM or a preemption notice.

    All processes of a run call it at every step and get True at the same one.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread alone
        yield lambda step: False
        return
    notice = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: notice.set())
    try:
        yield lambda step: notice.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def deadline(seconds: float) -> Iterator[Callable[[], None]]:
    """Yields `heartbeat()`; once called, and then not again in time, this process ends with `EXIT_STALLED`.

    Neither the time before the first call counts, in which programs are compiled for minutes, nor that in which this
    process is suspended itself (SIGSTOP, a machine asleep).

    Args:
      seconds: between two calls; 0: any number.
    """
    waited = [-math.inf]
    done, tick = threading.Event(), min(1.0, seconds / 4)

    def watch() -> None:
        last = time.monotonic()
        while not done.wait(tick):
            now = time.monotonic()
            waited[0] += min(now - last, 2 * tick)  # a longer pause is one of this thread as well
            last = now
            if waited[0] > seconds:
                why = "is another process stopped?" if jax.process_count() > 1 else "does a device or a disk hang?"
                exit_process(f"nothing moved for {seconds:g} s (hosts.step_seconds): {why}", EXIT_STALLED)

    def heartbeat() -> None:
        waited[0] = 0.0

    if seconds:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield heartbeat
    finally:
        done.set()


def exit_process(message: str, code: int) -> NoReturn:
    """Ends this process and its data workers at once: the usual way out would wait for processes that will not come."""
    print(f"\nError: {message}", file=sys.stderr, flush=True)
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(code)
