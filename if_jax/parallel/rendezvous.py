"""Whether the processes of a run reach each other at all, asked over the coordinator's port before JAX uses it.

JAX itself ends a process that waits in vain with a stack trace that names nobody. Here process 0 listens for a while,
each other process sends one line of JSON, and process 0 answers all of them with what it has received.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

from if_jax.parallel import jax_internals

_LONGEST = 1 << 22  # bytes of one line
Payload = dict[str, Any]  # JSON values that a process sends to the others


class ProcessMissing(ValueError):
    """A process of the run has not come in time."""


class Address(NamedTuple):
    """Which process of a run this is, and where process 0 listens."""

    coordinator: str  # HOST:PORT
    processes: int
    process: int


def resolve_address(
    coordinator: str | None, processes: int | None, process: int | None, seconds: int
) -> Address | None:
    """This process among others: by the three options, or as JAX reads it from TPU VM, GKE, Slurm or Open MPI.

    Args:
      coordinator: with the next two, all three or none, see `hosts.check_address`.
      processes: likewise.
      process: likewise.
      seconds: how long a scheduler may take to answer.

    Returns:
      None for a process that belongs to no others.

    Raises:
      ValueError: the environment describes several machines, but not all that is needed.
    """
    if coordinator is None:
        try:
            coordinator, processes, process = jax_internals.detect_cluster(seconds)
        except Exception as error:  # whatever a metadata server or a scheduler's variables can be
            raise ValueError(
                f"this machine is described as one of several, but not how to find them ({error})"
            ) from None
    if coordinator is None or processes is None or process is None:
        return None
    return Address(coordinator, processes, process)


def wait_for_all(address: Address, seconds: float) -> None:
    """Returns once all processes are there; process 0 listens at its address until then.

    Raises:
      ProcessMissing: in every process that has come, naming those that have not.
      ValueError: as `exchange_payloads`.
    """
    payloads = exchange_payloads(address, {"host": socket.gethostname()}, seconds)
    if absent := [index for index, payload in enumerate(payloads) if payload is None]:
        here = ", ".join(sorted({payload["host"] for payload in payloads if payload}))
        raise ProcessMissing(missing(absent, address.processes, seconds, f"{here} came to {address.coordinator}"))


def missing(absent: list[int], count: int, seconds: float, rest: str = "") -> str:
    """The line that names the processes which have not come.

    Args:
      absent: their numbers.
      count: of all processes.
      seconds: how long they were waited for.
      rest: what else is known.
    """
    who = f"process {', '.join(map(str, absent))} of {count} {'is' if len(absent) == 1 else 'are'} not there"
    return f"{who} after {seconds:g} s{f' ({rest})' if rest else ''}: look at its log, or start it"


def exchange_payloads(address: Address, payload: Payload, seconds: float) -> list[Payload | None]:
    """Gives every process the payload of every other, before JAX has connected them.

    Args:
      address: of process 0, and which process this is.
      payload: of this process, with its "host".
      seconds: how long to wait for the others.

    Returns:
      The payloads in the order of the processes; None for one that has not come in time.

    Raises:
      ProcessMissing: process 0 has not come itself.
      ValueError: the address does not lead to process 0, its port is taken, or two processes claim one number.
    """
    host, _, port = address.coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"coordinator is {address.coordinator!r}: write HOST:PORT")
    server = (host.strip("[]"), int(port))
    serve_or_call = _serve if address.process == 0 else _call
    answer = serve_or_call(server, address, payload, seconds)
    if answer["problem"]:
        raise ValueError(answer["problem"])
    return answer["payloads"]


def _serve(server: tuple[str, int], address: Address, payload: Payload, seconds: float) -> dict[str, Any]:
    answer: dict[str, Any] = {"payloads": [payload, *[None] * (address.processes - 1)], "problem": ""}
    end = time.monotonic() + seconds
    with ExitStack() as stack:
        try:
            listener = stack.enter_context(socket.create_server(("", server[1]), backlog=address.processes + 8))
        except OSError as error:
            raise ValueError(
                f"port {server[1]} cannot be opened here ({error.strerror}): end what holds it, or choose another port"
            ) from None
        _check_own_address(server)
        peers: list[socket.socket] = []
        while None in answer["payloads"] and not answer["problem"] and (left := end - time.monotonic()) > 0:
            listener.settimeout(left)
            try:
                peer = stack.enter_context(listener.accept()[0])
            except TimeoutError:
                break
            if (line := _read_line(peer, min(left, 5.0))) and "process" in line:
                peers.append(peer)
                _register(answer, line, address.processes)
        listener.close()  # what a peer calls next is not to end up here
        for peer in peers:
            _send_line(peer, answer)
    return answer


def _register(answer: dict[str, Any], line: Mapping[str, Any], count: int) -> None:
    index, host, processes = line["process"], line["payload"].get("host"), line["processes"]
    if processes != count:
        answer["problem"] = f"process {index} on {host} was told of {processes} processes, process 0 of {count}: "
        answer["problem"] += "give all the same --processes"
    elif answer["payloads"][index] is not None:
        other = answer["payloads"][index].get("host")
        answer["problem"] = f"process {index} has come twice, on {other} and {host}: give each its own --process"
    else:
        answer["payloads"][index] = line["payload"]


def _call(server: tuple[str, int], address: Address, payload: Payload, seconds: float) -> dict[str, Any]:
    end = time.monotonic() + seconds
    while True:
        try:
            peer = socket.create_connection(server, timeout=max(0.1, min(5.0, end - time.monotonic())))
            break
        except OSError as error:
            if time.monotonic() > end:
                raise ProcessMissing(
                    f"coordinator {server[0]}:{server[1]} cannot be reached after {seconds:g} s "
                    f"({error.strerror or error}): start process 0 there, and open port {server[1]} in the firewall"
                ) from None
            time.sleep(0.2)
    with peer:
        _send_line(peer, {"process": address.process, "processes": address.processes, "payload": payload})
        answer = _read_line(peer, seconds + 5.0)  # process 0 may have begun to wait only now
    if answer is None:
        raise ProcessMissing(
            f"coordinator {server[0]}:{server[1]} answers, but not as process 0 of this command: look at its log, run "
            "it on all processes at once, and not beside a training that uses the port"
        )
    return answer


def _check_own_address(server: tuple[str, int]) -> None:
    try:
        socket.create_connection(server, timeout=5.0).close()
    except OSError as error:
        raise ValueError(
            f"coordinator {server[0]} does not lead to this machine, which runs process 0 ({error.strerror or error}): "
            "give the address of this one"
        ) from None


def _send_line(peer: socket.socket, content: Mapping[str, Any]) -> None:
    try:
        peer.sendall(json.dumps(content).encode() + b"\n")
    except OSError:  # it has gone
        return


def _read_line(peer: socket.socket, seconds: float) -> dict[str, Any] | None:
    """One line of JSON within `seconds`; None for anything else."""
    peer.settimeout(seconds)
    try:
        with peer.makefile("rb") as stream:
            line = json.loads(stream.readline(_LONGEST))
    except (OSError, ValueError):
        return None
    return line if isinstance(line, dict) and line.keys() & {"process", "problem"} else None
