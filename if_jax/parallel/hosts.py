"""Several processes as one run: how they find each other, and what they must agree on before anything is compiled."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax


def connect(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    start_seconds: int = 300,
    heartbeat_seconds: int = 100,
) -> None:
    """Joins the processes of a run, before any other use of JAX; a process that nothing tells of others stays alone.

    coordinator: "HOST:PORT" of process 0, with `processes` and `process` (0 … processes − 1), for machines that nothing
    describes; left out, JAX reads them from the environment (TPU VM, GKE, Slurm, Open MPI).
    start_seconds: how long to wait for the others. heartbeat_seconds: silence after which a process counts as dead and
    the others leave.
    Raises ValueError where the three are not given together, or the others are not found.
    """
    given = (coordinator, processes, process)
    if any(value is not None for value in given) and None in given:
        raise ValueError(
            f"coordinator {coordinator}, processes {processes}, process {process}: give all three, or none where the "
            "environment tells them (TPU VM, GKE, Slurm, Open MPI)"
        )
    if process is not None and not 0 <= process < processes:
        raise ValueError(f"process is {process} of {processes}: use 0…{max(processes, 1) - 1}")
    if jax.distributed.is_initialized():
        return
    waits = {"initialization_timeout": start_seconds, "heartbeat_timeout_seconds": heartbeat_seconds}
    try:
        jax.distributed.initialize(coordinator, processes, process, **waits)
    except (ValueError, RuntimeError) as error:
        if coordinator is None and ("coordinator_address" in str(error) or "before any JAX calls" in str(error)):
            return  # nothing describes other processes, or whoever started JAX has decided
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"process {process} of {processes} did not find the others at {coordinator} within {start_seconds} s "
            f"({first}): start all of them, and open that port"
        ) from None
    # Gloo matches the collectives of two processes by their order, and CPU programs in flight at once have none.
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def code_hash() -> str:
    """A short SHA-256 of this package's source: what "the same version on every host" means."""
    root, digest = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def preflight(facts: Mapping[str, Any], seconds: int = 300) -> None:
    """Compares `facts` (JSON values) of all processes; returns at once where there is only one.

    Raises ValueError naming the process and host that is missing after `seconds`, or that differs, and in what.
    """
    if jax.process_count() == 1:
        return
    # The key-value store of the coordinator: unlike a collective it tells who has not come.
    from jax._src import distributed

    client = distributed.global_state.client
    own = json.dumps({"host": socket.gethostname(), **facts}, sort_keys=True)
    client.key_value_set(f"if_jax/preflight/{jax.process_index()}", own)
    first: dict[str, Any] = {}
    for index in range(jax.process_count()):
        try:
            told = json.loads(client.blocking_key_value_get(f"if_jax/preflight/{index}", seconds * 1000))
        except jax.errors.JaxRuntimeError:
            raise ValueError(
                f"process {index} of {jax.process_count()} is not there after {seconds} s: look at its log, or start it"
            ) from None
        first = first or told
        if other := [name for name in facts if told.get(name) != first.get(name)]:
            pairs = "; ".join(f"{name} {told.get(name)!r}, not {first.get(name)!r}" for name in other)
            raise ValueError(f"process {index} on {told['host']} differs from process 0 on {first['host']}: {pairs}")
