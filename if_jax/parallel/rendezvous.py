"""Whether the processes of a run reach each other at all, asked over the coordinator's port before JAX uses it.

JAX itself ends a process that waits in vain with a stack trace that names nobody. Here process 0 listens for a while,
each other process says one line of JSON, and all of them hear who has come.
"""

from __future__ import annotations

import json
import socket
import time
from contextlib import ExitStack
from typing import Any

_LONGEST = 1 << 22  # bytes of one line


class Absent(ValueError):
    """A process of the run has not come in time."""


def gather(address: str, count: int, index: int, seconds: float) -> None:
    """Returns once all `count` processes are there; process 0 listens at the address until then.

    Raises Absent, in every process that has come, naming those that have not; ValueError as `meet`.
    """
    told = meet(address, count, index, {"host": socket.gethostname()}, seconds)
    if missing := [i for i, one in enumerate(told) if one is None]:
        here = ", ".join(sorted({one["host"] for one in told if one}))
        raise Absent(absence(missing, count, seconds, f"{here} came to {address}"))


def absence(missing: list[int], count: int, seconds: float, rest: str = "") -> str:
    """The line that names the processes which have not come."""
    who = f"process {', '.join(map(str, missing))} of {count} {'is' if len(missing) == 1 else 'are'} not there"
    return f"{who} after {seconds:g} s{f' ({rest})' if rest else ''}: look at its log, or start it"


def whereabouts(seconds: int) -> tuple[str, int, int] | None:
    """(HOST:PORT, processes, process) as JAX reads them from a TPU VM, GKE, Slurm or Open MPI; None where none tells.

    Raises ValueError where such an environment is there but does not say all three.
    """
    from jax._src import clusters

    try:
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, seconds)[:3]
    except Exception as error:  # whatever a metadata server or a scheduler's variables can be
        raise ValueError(f"this machine is described as one of several, but not how to find them ({error})") from None
    return None if None in found else found


def meet(address: str, count: int, index: int, told: dict[str, Any], seconds: float) -> list[dict[str, Any] | None]:
    """What each of `count` processes tells (JSON values), by its index; None for one that has not come in time.

    Raises Absent where process 0 has not come itself, ValueError where the address does not lead to it, its port is
    taken, or two processes claim one index.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"coordinator is {address!r}: write HOST:PORT")
    where = (host.strip("[]"), int(port))
    heard = _listen(where, count, told, seconds) if index == 0 else _call(where, count, index, told, seconds)
    if heard["problem"]:
        raise ValueError(heard["problem"])
    return heard["told"]


def _listen(where: tuple[str, int], count: int, own: dict[str, Any], seconds: float) -> dict[str, Any]:
    heard: dict[str, Any] = {"told": [own, *[None] * (count - 1)], "problem": ""}
    end = time.monotonic() + seconds
    with ExitStack() as stack:
        try:
            server = stack.enter_context(socket.create_server(("", where[1]), backlog=count + 8))
        except OSError as error:
            raise ValueError(
                f"port {where[1]} cannot be opened here ({error.strerror}): end what holds it, or choose another port"
            ) from None
        _check_own_address(where)
        peers: list[socket.socket] = []
        while None in heard["told"] and not heard["problem"] and (left := end - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                peer = stack.enter_context(server.accept()[0])
            except TimeoutError:
                break
            if (line := _read_line(peer, min(left, 5.0))) and "process" in line:
                peers.append(peer)
                _note(heard, line, count)
        server.close()  # what a peer calls next is not to end up here
        for peer in peers:
            _say(peer, heard)
    return heard


def _note(heard: dict[str, Any], line: dict[str, Any], count: int) -> None:
    index, host, processes = line["process"], line["told"].get("host"), line["processes"]
    if processes != count:
        heard["problem"] = f"process {index} on {host} was told of {processes} processes, process 0 of {count}: "
        heard["problem"] += "give all the same --processes"
    elif heard["told"][index] is not None:
        other = heard["told"][index].get("host")
        heard["problem"] = f"process {index} has come twice, on {other} and {host}: give each its own --process"
    else:
        heard["told"][index] = line["told"]


def _call(where: tuple[str, int], count: int, index: int, told: dict[str, Any], seconds: float) -> dict[str, Any]:
    end = time.monotonic() + seconds
    while True:
        try:
            peer = socket.create_connection(where, timeout=max(0.1, min(5.0, end - time.monotonic())))
            break
        except OSError as error:
            if time.monotonic() > end:
                raise Absent(
                    f"coordinator {where[0]}:{where[1]} cannot be reached after {seconds:g} s "
                    f"({error.strerror or error}): start process 0 there, and open port {where[1]} in the firewall"
                ) from None
            time.sleep(0.2)
    with peer:
        _say(peer, {"process": index, "processes": count, "told": told})
        heard = _read_line(peer, seconds + 5.0)  # process 0 may have begun to wait only now
    if heard is None:
        raise Absent(
            f"coordinator {where[0]}:{where[1]} answers, but not as process 0 of this command: look at its log, run it "
            "on all processes at once, and not beside a training that uses the port"
        )
    return heard


def _check_own_address(where: tuple[str, int]) -> None:
    try:
        socket.create_connection(where, timeout=5.0).close()
    except OSError as error:
        raise ValueError(
            f"coordinator {where[0]} does not lead to this machine, which runs process 0 ({error.strerror or error}): "
            "give the address of this one"
        ) from None


def _say(peer: socket.socket, content: dict[str, Any]) -> None:
    try:
        peer.sendall(json.dumps(content).encode() + b"\n")
    except OSError:  # it has gone
        return


def _read_line(peer: socket.socket, seconds: float) -> dict[str, Any] | None:
    """One line of JSON within `seconds`; None for anything else."""
    peer.settimeout(seconds)
    try:
        with peer.makefile("rb") as stream:
            found = json.loads(stream.readline(_LONGEST))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.keys() & {"process", "problem"} else None
