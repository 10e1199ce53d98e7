"""Several processes as one run: how they find each other, what they must agree on, and how they leave.

A process leaves with a code and a line that say why; a supervisor starts the run again after all but the first two:

    1, 2      a mistake to be mended: the recipe, the data, the command
    75        another process of the run was lost
    76        nothing moved for `step_seconds`: another process is stopped, or a device hangs
    77        a process has not come within `start_seconds`
    143       told to end (SIGTERM, a preemption notice); the state was saved
"""

from __future__ import annotations

import hashlib
import json
import math
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

from if_jax.parallel import rendezvous

LOST, STUCK, ABSENT, TERMINATED = 75, 76, 77, 143


class Terminated(Exception):
    """This process was told to end and has saved its state."""


def connect(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    start_seconds: int,
    heartbeat_seconds: int,
) -> None:
    """Joins the processes of a run, before any other use of JAX; a process that nothing tells of others stays alone.

    coordinator: "HOST:PORT" of process 0, with `processes` and `process` (0 … processes − 1), for machines that nothing
    describes; left out, JAX reads them from the environment (TPU VM, GKE, Slurm, Open MPI).
    start_seconds: how long to wait for the others. heartbeat_seconds: silence after which a process counts as dead and
    the others leave.
    Raises rendezvous.Absent naming the processes that have not come, ValueError where the three are not given together
    or do not lead to the others.
    """
    from jax._src.xla_bridge import backends_are_initialized

    check_address(coordinator, processes, process)
    if jax.distributed.is_initialized() or (coordinator is None and backends_are_initialized()):
        return  # whoever started JAX has decided
    place = rendezvous.whereabouts(start_seconds) if coordinator is None else (coordinator, processes, process)
    if place is None:
        return
    if place[1] > 1:  # JAX ends a process that waits in vain with a trace that names nobody
        rendezvous.gather(*place, start_seconds)
    join(coordinator, processes, process, start_seconds=start_seconds, heartbeat_seconds=heartbeat_seconds)


def join(
    coordinator: str | None, processes: int | None, process: int | None, *, start_seconds: int, heartbeat_seconds: int
) -> None:
    """The second half of `connect`, for processes that have met: JAX connects them. ValueError where it cannot."""
    waits = {"initialization_timeout": start_seconds, "heartbeat_timeout_seconds": heartbeat_seconds}
    try:
        jax.distributed.initialize(coordinator, processes, process, **waits)
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
    """Raises ValueError unless all three are given, or none, and the process is one of them."""
    given = (coordinator, processes, process)
    if any(value is not None for value in given) and None in given:
        raise ValueError(
            f"coordinator {coordinator}, processes {processes}, process {process}: give all three, or none where the "
            "environment tells them (TPU VM, GKE, Slurm, Open MPI)"
        )
    if process is not None and not 0 <= process < processes:
        raise ValueError(f"process is {process} of {processes}: use 0…{max(processes, 1) - 1}")


def code_hash() -> str:
    """A short SHA-256 of this package's source: what "the same version on every host" means."""
    root, digest = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def preflight(facts: Mapping[str, Any], seconds: int = 300) -> None:
    """Compares `facts` (JSON values) of all processes, of which there are several.

    Raises ValueError naming the process and host that differs, and in what; rendezvous.Absent as `exchange`.
    """
    first, *others = exchange("preflight", {"host": socket.gethostname(), **facts}, seconds)
    for index, told in enumerate(others, start=1):
        if other := [name for name in facts if told.get(name) != first.get(name)]:
            pairs = "; ".join(f"{name} {told.get(name)!r}, not {first.get(name)!r}" for name in other)
            raise ValueError(f"process {index} on {told['host']} differs from process 0 on {first['host']}: {pairs}")


def exchange(topic: str, told: Mapping[str, Any], seconds: int) -> list[dict[str, Any]]:
    """What every process tells under a topic (JSON values), in their order; each process may tell once.

    Raises rendezvous.Absent naming the process that has told nothing after `seconds`.
    """
    # The key-value store of the coordinator: unlike a collective it tells who has not come.
    from jax._src import distributed

    client = distributed.global_state.client
    client.key_value_set(f"if_jax/{topic}/{jax.process_index()}", json.dumps(told, sort_keys=True))
    found = []
    for index in range(jax.process_count()):
        try:
            found.append(json.loads(client.blocking_key_value_get(f"if_jax/{topic}/{index}", seconds * 1000)))
        except jax.errors.JaxRuntimeError:
            raise rendezvous.Absent(rendezvous.absence([index], jax.process_count(), seconds)) from None
    return found


@contextmanager
def termination() -> Iterator[Callable[[int], bool]]:
    """Yields `told(step)`: whether to save and end after this step, for SIGTERM or a preemption notice.

    All processes of a run call it at every step and hear it at the same one.
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
    """Yields `heartbeat()`; once called, and then not again for `seconds`, this process leaves with code 76. 0 = never.

    So the time before, in which programs are compiled for minutes, is not counted.
    """
    last = [math.inf]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(min(1.0, seconds / 4)):
            if time.monotonic() - last[0] > seconds:
                exit_process(
                    f"nothing moved for {seconds:g} s (hosts.step_seconds): is another process stopped?", STUCK
                )

    def heartbeat() -> None:
        last[0] = time.monotonic()

    if seconds:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield heartbeat
    finally:
        done.set()


def exit_process(why: str, code: int) -> NoReturn:
    """Ends this process at once: the usual way out would wait for processes that will not come."""
    print(f"\nError: {why}", file=sys.stderr, flush=True)
    os._exit(code)
