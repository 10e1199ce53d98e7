"""Two real processes train as one: the same losses as one process, and no start where they differ."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny_recipe

from if_jax.parallel import hosts, rendezvous

TESTS = Path(__file__).parent.parent
KEYS = {"steps": 4, "checkpoint_every": 2, "mesh.data": 1, "mesh.fsdp": 2, "mesh.rules": "fsdp"}
KEYS |= {"sample.every": 4, "sample.steps": 2, "hosts.start_seconds": 120}
KEYS |= {"validation.every": 4, "validation.samples": 8, "validation.batch_size": 8}
RECIPE = tiny_recipe.arguments(KEYS)


def _start(workdir, devices, *more):
    command = [sys.executable, "-m", "if_jax", "train", *RECIPE, "--workdir", str(workdir), *more]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _free_place():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def _pair(workdir, *differing):
    """Two processes of one device each, the second one's arguments with `differing`; their exit codes and output."""
    joined = ["--coordinator", _free_place(), "--processes", "2", "--process"]
    started = [_start(workdir, 1, *joined, str(i), *(differing if i else ())) for i in range(2)]
    outputs = [_output(process) for process in started]
    return [process.returncode for process in started], outputs


def _output(process):
    try:
        return process.communicate(timeout=900)[0]
    finally:
        process.kill()


def _rows(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "mse", "vb", "grad_norm")
    return [{name: row[name] for name in row if name in kept or name.startswith("validation")} for row in rows]


@pytest.mark.slow  # now and then gloo takes one collective of a CPU program for another, and the pair aborts
def test_two_processes_give_the_losses_of_one(tmp_path):
    alone = _start(tmp_path / "one", 2)
    output = _output(alone)
    assert alone.returncode == 0, output
    codes, outputs = _pair(tmp_path / "two")
    assert codes == [0, 0], outputs
    assert len(_rows(tmp_path / "one")) == 5  # four steps and a validation
    assert _rows(tmp_path / "two") == _rows(tmp_path / "one")
    assert (tmp_path / "two" / "samples" / "samples-0000004.png").is_file()


def test_processes_that_differ_do_not_start(tmp_path):
    codes, outputs = _pair(tmp_path / "run", "--config.seed=7")
    assert codes == [1, 1], outputs
    for output in outputs:
        errors = [line for line in output.splitlines() if line.startswith("Error: ")]
        assert len(errors) == 1 and "process 1 on" in errors[0] and "differs from process 0" in errors[0], output
        assert ": recipe '" in errors[0] and "code" not in errors[0].partition("differs")[2]
    assert not (tmp_path / "run").exists()


def test_a_mistake_on_one_process_ends_both_at_once(tmp_path):
    """Pairs that fail while they train: test_pairs.py."""
    codes, outputs = _pair(tmp_path / "run", "--config.text_encoder_from=/nowhere")
    assert codes == [1, 1], outputs
    for output, prefix in zip(outputs, (f"Error: process 1 on {socket.gethostname()}: ", "Error: "), strict=True):
        errors = [line for line in output.splitlines() if line.startswith("Error: ")]
        assert len(errors) == 1 and errors[0].startswith(prefix) and "/nowhere" in errors[0], output
        assert "Traceback" not in output and "Aborted" not in output
    assert not (tmp_path / "run").exists()


def test_processes_that_wait_in_vain_name_the_missing_one(tmp_path):
    """Real processes, each the only one to come: which is not there in one line, and an exit code of its own."""
    waits = ["--config.hosts.start_seconds=1", "--processes", "2"]
    first = _start(tmp_path / "run", 1, *waits, "--coordinator", _free_place(), "--process", "0")
    second = _start(tmp_path / "run", 1, *waits, "--coordinator", place := _free_place(), "--process", "1")
    host = socket.gethostname()
    for process, message in (
        (first, f"process 1 of 2 is not there after 1 s ({host} came to localhost:"),
        (second, f"coordinator {place} cannot be reached after 1 s"),
    ):
        lines = [line for line in _output(process).splitlines() if line]
        assert process.returncode == hosts.EXIT_PROCESS_MISSING, lines
        assert len(lines) == 1 and lines[0].startswith(f"Error: {message}") and "start" in lines[0], lines
    assert not (tmp_path / "run").exists()


def test_all_who_came_hear_who_did_not():
    place, messages = _free_place(), {}

    def come(index):
        with pytest.raises(rendezvous.ProcessMissing) as caught:
            rendezvous.wait_for_all(rendezvous.Address(place, 5, index), 1)
        messages[index] = str(caught.value)

    threads = [threading.Thread(target=come, args=(index,)) for index in (0, 2, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(messages) == 3 and set(messages.values()) == {messages[0]}
    assert messages[0].startswith("process 1, 3 of 5 are not there after 1 s")


def test_a_process_0_that_is_lost_meanwhile_is_no_mistake():
    """A process 0 that is lost while the others wait: they are to start again, not to give up."""
    place = _free_place()
    with socket.create_server(("", int(place.rpartition(":")[2]))) as server:
        lost = threading.Thread(target=lambda: server.accept()[0].close())
        lost.start()
        with pytest.raises(rendezvous.ProcessMissing, match="look at its log"):
            rendezvous.wait_for_all(rendezvous.Address(place, 2, 1), 5)
        lost.join()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (("localhost:1", None, 0), "give all three, or none"),
        ((None, 2, None), "give all three, or none"),
        (("localhost:1", 2, 2), r"process is 2 of 2: use 0…1"),
    ],
)
def test_half_an_address_is_refused(address, message):
    with pytest.raises(ValueError, match=message):
        hosts.connect(*address, start_seconds=1, heartbeat_seconds=1)


def test_the_code_hash_is_of_the_source():
    assert hosts.code_hash() == hosts.code_hash() and len(hosts.code_hash()) == 16


def test_the_deadline_counts_from_the_first_step(monkeypatch):
    left = []
    monkeypatch.setattr(hosts, "exit_process", lambda message, code: left.append(code))
    with hosts.deadline(0.1) as heartbeat:
        time.sleep(0.4)  # compiling
        assert not left
        heartbeat()
        time.sleep(0.4)
    assert left and set(left) == {hosts.EXIT_STALLED}
