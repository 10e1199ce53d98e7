"""Which errors may pass by themselves, and how a process ends. Pairs of processes: test_hosts.py, test_pairs.py."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time

import jax
import pytest

from if_jax.parallel import failures, hosts, rendezvous


class HttpError(Exception):
    """As gcsfs raises it."""

    def __init__(self, code):
        super().__init__(f"answer {code}")
        self.code = code


def _caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error", "a.tar"),
        OSError(errno.ESTALE, "Stale file handle"),
        ConnectionResetError(),
        TimeoutError(),
        HttpError(503),
        ValueError("UNAVAILABLE: Error reading gs://bucket/a"),
        RuntimeError("Worker process was terminated unexpectedly with exit code -9. Search the logs above"),
        _caused(ValueError("checkpoint 5 cannot be read"), OSError(errno.EIO, "Input/output error")),
    ],
)
def test_what_may_pass_is_tried_again(error):
    assert failures.is_transient(error) and failures.exit_code(error) == hosts.EXIT_TRANSIENT


@pytest.mark.parametrize(
    "error",
    [
        ValueError("batch_size"),
        FileNotFoundError(errno.ENOENT, "No such file", "a"),
        PermissionError(errno.EACCES, "Permission denied", "a"),
        OSError(errno.ENOSPC, "No space left on device", "a"),
        HttpError(403),
        FloatingPointError("nan"),
    ],
)
def test_a_mistake_is_not_tried_again(error):
    assert not failures.is_transient(error) and failures.exit_code(error) == 1


def test_other_exit_codes():
    assert failures.exit_code(rendezvous.ProcessMissing("process 1")) == hosts.EXIT_PROCESS_MISSING
    assert failures.exit_code(KeyboardInterrupt()) == hosts.EXIT_INTERRUPTED
    assert failures.one_line(OSError(errno.ENOSPC, "No space left on device", "a b")) == "No space left on device: a b"
    assert failures.one_line(ValueError("two\n lines")) == "two lines"


def test_a_process_that_ends_takes_its_data_workers_along(monkeypatch):
    worker = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    worker.start()
    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    with pytest.raises(SystemExit):
        hosts.exit_process("told", 76)
    worker.join(20)
    assert worker.exitcode == -9


def test_a_process_that_is_alone_needs_nobody():
    """No name service, no port, as under Slurm with one task."""
    hosts.connect("nowhere.invalid:1", 1, 0, start_seconds=1, heartbeat_seconds=1)
    assert not jax.distributed.is_initialized()


def test_the_time_in_which_a_process_is_suspended_does_not_count(monkeypatch):
    left, clock, suspended = [], time.monotonic, [0.0]
    monkeypatch.setattr(hosts, "exit_process", lambda message, code: left.append(message))
    monkeypatch.setattr(hosts.time, "monotonic", lambda: clock() + suspended[0])
    with hosts.deadline(20.0) as heartbeat:
        heartbeat()
        suspended[0] = 3600.0
        time.sleep(1.5)  # one look, or more
    assert not left


class Coordinator:
    """Its key-value store, of a run whose process 1 gives signs of life before it sends what is waited for."""

    def __init__(self, signs):
        self.store, self.signs = {}, signs

    def key_value_set(self, key, value, allow_overwrite=False):
        self.store[key] = value

    def key_value_try_get(self, key):
        return str(self.signs)

    def blocking_key_value_get(self, key, milliseconds):
        if key in self.store:
            return self.store[key]
        time.sleep(milliseconds / 1000)
        self.signs -= self.signs > 0
        if not self.signs:
            self.store[key] = "{}"
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out")


def test_who_still_compiles_is_waited_for(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(hosts.jax_internals, "coordinator_client", lambda: Coordinator(10))
    assert hosts.exchange("compiled", {}, 0.2, while_alive=True) == [{}, {}]
    with pytest.raises(rendezvous.ProcessMissing, match="process 1 of 2 is not there"):
        hosts.exchange("compiled", {}, 0.2)
