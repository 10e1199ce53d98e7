"""A failure of one process ends all processes of a run: at once, with the same line and exit code.

JAX's own way out of one process waits for the others (300 s), which wait for it, and then aborts. Here the process that
fails leaves word at the coordinator, every other one hears it within a second, and all leave without waiting. Whether a
supervisor should start the run again is in the code: `is_transient` tells what may pass by itself from a mistake.
"""

from __future__ import annotations

import errno
import json
import re
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import jax

from if_jax.parallel import hosts, jax_internals, rendezvous

_KEY = "if_jax/failure"
_POLL, _BEAT = 1.0, 5.0  # seconds between looks for a failure, and between signs of life
_READ_SECONDS = 5.0  # how long process 0, to which all are connected, waits for the others to have read it
_NEWS_SECONDS = 5.0  # how long word of what ended a process may take longer than the loss of its connections
_TRANSIENT = {
    *(errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH),
}
_TRANSIENT_NAMES = {"ClientConnectionError", "ClientPayloadError", "ConnectionError", "Timeout", "TransientError"}
_TRANSIENT_WORDS = re.compile(r"(UNAVAILABLE|DEADLINE_EXCEEDED)\b|.* was terminated unexpectedly with exit code")
_MISTAKES = (ValueError, OSError, FloatingPointError, MemoryError)
_leaving = threading.Lock()  # whoever holds it ends this process


def is_transient(error: BaseException) -> bool:
    """Whether an error may pass by itself, so that the same command is worth another try.

    That is: a disk or mount that fails (EIO, ESTALE), a connection, an object store's 5xx, a data worker that was
    killed. A full disk, a missing file and what a recipe says wrongly are mistakes.

    Args:
      error: with what it was raised from.
    """
    return any(map(_is_transient_itself, _chain(error)))


def _is_transient_itself(error: BaseException) -> bool:
    code = getattr(error, "code", None)  # of HTTP, as gcsfs and Google's clients have it
    return (
        isinstance(error, ConnectionError | TimeoutError)
        or (isinstance(error, OSError) and error.errno in _TRANSIENT)
        or (isinstance(error, Exception) and isinstance(code, int) and (code in (408, 429) or 500 <= code < 600))
        or any(base.__name__ in _TRANSIENT_NAMES for base in type(error).__mro__)
        or bool(_TRANSIENT_WORDS.match(str(error)))
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def one_line(error: BaseException) -> str:
    """What an error says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename or 'while writing'}"
    return " ".join(str(error).split()) or type(error).__name__


def exit_code(error: BaseException) -> int:
    """The exit code for an error, as `hosts` lists them."""
    if isinstance(error, rendezvous.ProcessMissing):
        return hosts.EXIT_PROCESS_MISSING
    if isinstance(error, KeyboardInterrupt):
        return hosts.EXIT_INTERRUPTED
    if jax.distributed.is_initialized() and any(isinstance(e, jax.errors.JaxRuntimeError) for e in _chain(error)):
        return hosts.EXIT_PROCESS_LOST  # what it sends, or waits for, does not come
    return hosts.EXIT_TRANSIENT if is_transient(error) else 1


@contextmanager
def propagated() -> Iterator[None]:
    """Around what a process of several does: what it raises ends all of them, and what another raises ends this one.

    A process that is alone raises as ever. `hosts.Terminated` is no failure: all processes raise it at the same step.
    """
    if not jax.distributed.is_initialized():
        yield
        return
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(jax_internals.coordinator_client(), done), daemon=True)
    watcher.start()
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, hosts.Terminated):
            raise
        abort(error)
    finally:
        done.set()
        watcher.join()


def abort(error: BaseException) -> NoReturn:
    """Ends this process, and the others of its run, for an error that one of them has met."""
    line, code = one_line(error), exit_code(error)
    if code == hosts.EXIT_PROCESS_LOST:
        time.sleep(_NEWS_SECONDS)  # in which `_watch` ends this process where the lost one has said why
        line = f"another process of this run was lost ({line[:200]}): start all of them again"
    elif not isinstance(error, (*_MISTAKES, KeyboardInterrupt)) and code == 1:
        traceback.print_exception(error)
        line = f"{type(error).__name__}: {line}"
    _leaving.acquire()
    if jax.distributed.is_initialized():
        failure = {"process": jax.process_index(), "host": socket.gethostname(), "line": line, "code": code}
        client = jax_internals.coordinator_client()
        with suppress(jax.errors.JaxRuntimeError):  # another process has failed before this one
            client.key_value_set(_KEY, json.dumps(failure))
        _mark_read(client)
    hosts.exit_process(line, code)


def _watch(client: Any, done: threading.Event) -> None:
    """Ends this process once another one has failed; until then gives signs of life, see `hosts.exchange`."""
    beats, last = 0, -_BEAT
    while not done.is_set():
        if time.monotonic() - last >= _BEAT:
            beats, last = beats + 1, time.monotonic()
            try:
                client.key_value_set(hosts.alive_key(jax.process_index()), str(beats), allow_overwrite=True)
            except jax.errors.JaxRuntimeError:
                return  # the coordinator is gone, which the other thread will hear
        try:
            failure = json.loads(client.blocking_key_value_get(_KEY, int(_POLL * 1000)))
        except jax.errors.JaxRuntimeError:
            done.wait(0.1)
            continue
        if failure["process"] == jax.process_index() or done.is_set():
            return
        _leaving.acquire()
        _mark_read(client)
        hosts.exit_process(f"process {failure['process']} on {failure['host']}: {failure['line']}", failure["code"])


def _mark_read(client: Any) -> None:
    """Says that this process knows. Process 0, without which JAX aborts the others, waits for them; not for ever."""
    end = time.monotonic() + _READ_SECONDS
    with suppress(jax.errors.JaxRuntimeError):  # the coordinator is gone, or a process does not answer
        client.key_value_set(f"{_KEY}/read/{jax.process_index()}", "yes", allow_overwrite=True)
        for index in range(1, jax.process_count() if jax.process_index() == 0 else 0):
            client.blocking_key_value_get(f"{_KEY}/read/{index}", max(1, int((end - time.monotonic()) * 1000)))
    if jax.process_index() == 0:
        time.sleep(0.5)  # in which they leave
