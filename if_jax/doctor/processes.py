"""The processes of a run: whether all come, and whether they are about to run the same thing."""

from __future__ import annotations

import socket
import uuid
from typing import Any

from etils import epath

from if_jax.doctor.findings import Finding, attempt
from if_jax.parallel import hosts, rendezvous

Place = tuple[str, int, int]  # HOST:PORT of process 0, how many, which this is

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


def find_place(given: Place | None, seconds: int) -> Place | None:
    """This process among others: as given, or as the environment tells; None for one that is alone."""
    return given or rendezvous.whereabouts(seconds)


def all_come(place: Place, seconds: float, problem: str) -> tuple[Finding, bool]:
    """Whether every process reaches process 0; `problem`: why this one cannot go on, told to the others."""
    address, count, index = place

    def meet() -> tuple[str, list[Any]]:
        return "", rendezvous.meet(address, count, index, {"host": socket.gethostname(), "problem": problem}, seconds)

    finding, told = attempt("coordinator", f"give the HOST:PORT of process 0 (it is {address})", meet)
    if told is None:
        return finding, False
    if missing := [str(i) for i, one in enumerate(told) if one is None]:
        here = ", ".join(sorted({one["host"] for one in told if one}))
        return Finding(
            "coordinator",
            "fail",
            f"process {', '.join(missing)} of {count} has not come to {address} within {seconds:g} s ({here} has)",
            "start it there, at the same time; look at its log, and at the way to that port",
        ), False
    if stopped := [f"process {i} on {one['host']}: {one['problem']}" for i, one in enumerate(told) if one["problem"]]:
        return Finding("coordinator", "fail", stopped[0], "see the report of that process"), False
    machines = len({one["host"] for one in told})
    return Finding("coordinator", "pass", f"{count} processes on {machines} host(s) reach {address}"), True


def agreement(facts: dict[str, Any], seconds: int) -> list[Finding]:
    """Compares what this process is about to run with all others."""
    told = {"host": socket.gethostname(), **facts}
    finding, everyone = attempt(
        "hosts", "run this on all processes", lambda: ("", hosts.exchange("doctor", told, seconds))
    )
    return [finding] if everyone is None else compare(everyone)


def compare(everyone: list[dict[str, Any]]) -> list[Finding]:
    """One failure for each fact in which a process differs from process 0."""
    first, found = everyone[0], []
    for name in first:
        other = next((i for i, told in enumerate(everyone) if told.get(name) != first[name]), None)
        if name == "host" or other is None:
            continue
        told = f"process {other} on {everyone[other]['host']} has {name} {everyone[other].get(name, 'none')!r}, "
        told += f"process 0 on {first['host']} {first[name]!r}"
        found.append(Finding("hosts", "fail", told, _REMEDIES.get(name, "make them equal")))
    same = ", ".join(name for name in first if name != "host")
    return found or [Finding("hosts", "pass", f"{len(everyone)} processes agree in {same}")]


def shared_folder(workdir: str, index: int, seconds: int) -> Finding:
    """Whether all processes see what process 0 writes into the run folder, where checkpoints are written together."""
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
