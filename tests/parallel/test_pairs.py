"""Two real processes of which one fails: both end at once, with one line and the code that says what to do."""

from __future__ import annotations

import signal
import time

import psutil
import pytest
import record_stores
from test_hosts import TESTS, _free_place, _output, _start

from if_jax.parallel import hosts

pytestmark = pytest.mark.slow  # a pair compiles for some seconds each

# What befalls process 1 alone, as the head of its recipe file.
RAISES = """
def broken(*words):
    batches = opened(*words)
    yield next(batches)
    yield next(batches)
    raise {error}

opened, setup.open_batches = setup.open_batches, broken
"""
COMPILES = """
def slow(*words):
    time.sleep({seconds})
    return compiled(*words)

compiled, executable_cache.compiled = executable_cache.compiled, slow
"""


def _recipe(tmp_path, head):
    path = tmp_path / "recipe.py"
    path.write_text(
        "import errno, sys, time\n"
        f"sys.path.insert(0, {str(TESTS)!r})\n"
        "from tiny_recipe import get_config\n"
        "from if_jax.training import executable_cache, setup\n" + head
    )
    return str(path)


def _pair(tmp_path, *more, head=""):
    """Two processes, the second one's recipe file with `head`."""
    joined = ["--coordinator", _free_place(), "--processes", "2", "--process"]
    second = ["--config", _recipe(tmp_path, head)] if head else []
    return [_start(tmp_path / "run", 1, *more, *joined, str(i), *(second if i else ())) for i in range(2)]


def _ends(pair, code, words):
    """Both end with the code and the words, the one soon after the other."""
    outputs, ended = [], []
    for process in reversed(pair):
        outputs.append(_output(process))
        ended.append(time.monotonic())
    assert ended[1] - ended[0] < 20
    assert [process.returncode for process in pair] == [code, code], outputs
    for output in outputs:
        assert sum(line.startswith("Error: ") and words in line for line in output.splitlines()) == 1, output


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        ("ValueError('picture 7 is not readable: remove it')", 1, "picture 7 is not readable: remove it"),
        ("OSError(errno.ENOSPC, 'No space left on device', 'a')", 1, "No space left on device: a"),
        ("OSError(errno.EIO, 'Input/output error', 'a.tar')", hosts.EXIT_TRANSIENT, "Input/output error: a.tar"),
    ],
    ids=["a mistake", "a full disk", "a lost disk"],
)
def test_what_one_process_meets_ends_both(tmp_path, error, code, words):
    _ends(_pair(tmp_path, head=RAISES.format(error=error)), code, words)


def _with_workers(tmp_path):
    """Arguments for a run without an end, whose data come from a process of their own."""
    tars = record_stores.write_tars(tmp_path / "tars", 20, 7)
    keys = {"data.source": tars, "data.workers": 1, "steps": 100_000, "sample.every": 0, "validation.every": 0}
    return [f"--config.{name}={value}" for name, value in keys.items()]


def _await_a_step(tmp_path, processes):
    metrics, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 600
    while not (metrics.exists() and metrics.read_text()):
        assert all(process.poll() is None for process in processes) and time.monotonic() < end
        time.sleep(0.2)


def test_ctrl_c_is_one_line_also_where_workers_read(tmp_path):
    process = _start(tmp_path / "run", 2, *_with_workers(tmp_path))
    _await_a_step(tmp_path, [process])
    children = psutil.Process(process.pid).children(True)
    for each in (process, *children):  # as a terminal does
        each.send_signal(signal.SIGINT)
    output = _output(process)
    assert process.returncode == hosts.EXIT_INTERRUPTED, output
    assert "Traceback" not in output and "Error: interrupted; the same command goes on" in output
    assert not psutil.wait_procs(children, timeout=20)[1]


def test_a_killed_data_worker_ends_both_to_be_tried_again(tmp_path):
    pair = _pair(tmp_path, *_with_workers(tmp_path))
    _await_a_step(tmp_path, pair)
    workers = [
        child for child in psutil.Process(pair[1].pid).children(True) if "spawn_main" in " ".join(child.cmdline())
    ]
    others = psutil.Process(pair[0].pid).children(True)
    for worker in workers:
        worker.send_signal(signal.SIGKILL)
    _ends(pair, hosts.EXIT_TRANSIENT, "terminated unexpectedly with exit code -9")
    assert not psutil.wait_procs(others, timeout=20)[1]


def test_who_compiles_longer_than_the_start_may_take_is_waited_for(tmp_path):
    pair = _pair(tmp_path, "--config.hosts.start_seconds=40", head=COMPILES.format(seconds=60))
    outputs = [_output(process) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs


def test_tensor_over_two_processes(tmp_path):
    keys = {"mesh.fsdp": 1, "mesh.tensor": 2, "mesh.rules": "fsdp_tp"}
    pair = _pair(tmp_path, *(f"--config.{name}={value}" for name, value in keys.items()))
    outputs = [_output(process) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
