"""The processes of a run: whether all come, and whether they are about to run the same thing."""

from __future__ import annotations

import socket
import uuid
from typing import Any

from etils import epath

from if_jax.doctor.findings import Finding, attempt
from if_jax.parallel import hosts, rendezvous

_REMEDIES = {
    "code": "install the same commit of if_jax on every host",
    "versions": "install the same versions on every host",
    "recipe": "start every process with the same --config and --config.KEY=VALUE",
    "text encoder": "copy the same text_encoder_from to every host",
    "data": "copy the same files to every host, or let all read one shared folder",
    "validation data": "copy the same files to every host, or let all read one shared folder",
    "embeddings": "copy the same data.embeddings to every host, or let all read one shared folder",
    "devices": "give every process as many devices: see its own report",
    "workdir": "start every process with the same --workdir",
}


def all_present(address: rendezvous.Address, seconds: float, problem: str) -> tuple[Finding, bool]:
    """Whether every process reaches process 0.

    Args:
      address: of process 0, and which process this is.
      seconds: how long to wait for the others.
      problem: why this one cannot go on, for the others to know; "" where it can.

    Returns:
      The finding, and whether all can go on together.
    """
    coordinator, count, _ = address
    own = {"host": socket.gethostname(), "problem": problem}
    finding, payloads = attempt(
        "coordinator",
        f"give the HOST:PORT of process 0 (it is {coordinator})",
        lambda: ("", rendezvous.exchange_payloads(address, own, seconds)),
    )
    if payloads is None:
        return finding, False
    present = [(i, payload) for i, payload in enumerate(payloads) if payload is not None]
    machines = sorted({payload["host"] for _, payload in present})
    if absent := [str(i) for i, payload in enumerate(payloads) if payload is None]:
        here = ", ".join(machines)
        return Finding(
            "coordinator",
            "fail",
            f"process {', '.join(absent)} of {count} has not come to {coordinator} within {seconds:g} s ({here} has)",
            "start it there, at the same time; look at its log, and at the way to that port",
        ), False
    if stopped := [f"process {i} on {other['host']}: {other['problem']}" for i, other in present if other["problem"]]:
        return Finding("coordinator", "fail", stopped[0], "see the report of that process"), False
    return Finding("coordinator", "pass", f"{count} processes on {len(machines)} host(s) reach {coordinator}"), True


def same_facts(facts: dict[str, Any], seconds: int) -> list[Finding]:
    """Compares what all processes are about to run.

    Args:
      facts: of this process, JSON values.
      seconds: how long to wait for the others.
    """
    own = {"host": socket.gethostname(), **facts}
    finding, payloads = attempt(
        "hosts", "run this on all processes", lambda: ("", hosts.exchange("doctor", own, seconds))
    )
    return [finding] if payloads is None else compare_facts(payloads)


def compare_facts(payloads: list[dict[str, Any]]) -> list[Finding]:
    """One failure for each fact in which a process differs from process 0; `payloads`: facts by process."""
    first, failures = payloads[0], []
    for name in first:
        i, other = next(((i, own) for i, own in enumerate(payloads) if own.get(name) != first[name]), (0, first))
        if name == "host" or i == 0:
            continue
        message = f"process {i} on {other['host']} has {name} {other.get(name, 'none')!r}, "
        message += f"process 0 on {first['host']} {first[name]!r}"
        failures.append(Finding("hosts", "fail", message, _REMEDIES.get(name, "make them equal")))
    same = ", ".join(name for name in first if name != "host")
    return failures or [Finding("hosts", "pass", f"{len(payloads)} processes agree in {same}")]


def shared_folder(workdir: str, index: int, seconds: int) -> Finding:
    """Whether all processes see what process 0 writes into the run folder, where checkpoints are written together.

    Args:
      workdir: folder of the run.
      index: which process this is.
      seconds: how long to wait for the others.
    """
    from if_jax.doctor.storage import nearest

    folder = epath.Path(workdir) if "://" in workdir else epath.Path(nearest(workdir))
    probe = folder / f".if_jax_doctor.{uuid.uuid4().hex}" if index == 0 else None

    def look() -> tuple[str, None]:
        path = hosts.exchange("doctor probe", {"path": _leave_probe(probe)}, seconds)[0]["path"]
        if not path:
            raise ValueError(f"process 0 cannot write to {folder}: see its report")
        own = {"host": socket.gethostname(), "sees": epath.Path(path).exists()}
        blind = [(i, o["host"]) for i, o in enumerate(hosts.exchange("doctor seen", own, seconds)) if not o["sees"]]
        if blind:
            raise ValueError(
                f"process {blind[0][0]} on {blind[0][1]} does not see what process 0 writes to {folder}: give a "
                "--workdir that all share, such as a gs:// path"
            )
        return f"all processes see {folder}", None

    try:
        return attempt("shared folder", "give a --workdir that all can write, such as a gs:// path", look)[0]
    finally:
        if probe and probe.exists():
            probe.unlink()


def _leave_probe(probe: epath.Path | None) -> str:
    """Its path once it is written; "" where it is another process's, or cannot be: the others must not wait in vain."""
    if probe is None:
        return ""
    try:
        probe.write_text("here")
    except Exception:  # as different as file systems and buckets are; the check of the run folder tells it
        return ""
    return str(probe)
