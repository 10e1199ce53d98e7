"""`if-jax embed` by real processes: the same files whatever their number, also where one of them was killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import bucket
import jax
import numpy as np
import pytest
import record_stores
import tiny

from if_jax.checkpoints.release import read_text_encoder, write_stage
from if_jax.checkpoints.stages import Encoders
from if_jax.data import embed, embedding_shards, embeddings, sources
from if_jax.data.preprocessing import Preparation
from if_jax.parallel import mesh, rules

TESTS = Path(__file__).parent.parent
COUNT, PER_SHARD, BATCH = 41, 4, 4
RECIPE = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from tiny_recipe import get_config
from if_jax.data import embedding_shards
embedding_shards.PER_SHARD = {PER_SHARD}
"""
# Process 1 ends itself where it is to write its third shard, as kill -9 would.
KILLED = """
import os, signal
write, calls = embedding_shards.CacheFolder.write, []
def dies(*words):
    calls.append(words)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    write(*words)
embedding_shards.CacheFolder.write = dies
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tars, a stage with a text encoder, and the cache `one` that one process writes."""
    place = tmp_path_factory.mktemp("place")
    record_stores.write_tars(place / "tars", COUNT, 11)
    write_stage(place / "stage_I", tiny.on_one_level(tiny.stages()[0]))
    text = Encoders(read_text_encoder(str(place / "stage_I"), None))
    layout = {"mesh": mesh.make_mesh(devices=jax.devices()[:1]), "sharding_rules": rules.PRESETS["dp"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding_shards, "PER_SHARD", PER_SHARD)
        embed.embed(
            sources.open_stored(str(place / "tars")),
            text,
            place / "one",
            form="exact",
            preparation=Preparation(),
            batch_size=BATCH,
            **layout,
        )
    return place


def _free_place() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def _start(place: Path, count: int, out: str | Path, *more: str, heads: dict[int, str] | None = None) -> list:
    """So many processes of one device each; `heads`: what befalls them, as the end of their recipe files."""
    processes, coordinator = [], _free_place()
    for number in range(count):
        recipe = place / f"recipe-{number}.py"
        recipe.write_text(RECIPE + (heads or {}).get(number, ""))
        words = ["embed", "--config", recipe, "--out", out, "--batch-size", BATCH, *more]
        words += [f"--config.data.source={place / 'tars'}", f"--config.text_encoder_from={place / 'stage_I'}"]
        words += ["--config.hosts.heartbeat_seconds=10"]
        words += ["--coordinator", coordinator, "--processes", count, "--process", number] if count > 1 else []
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS)])
        command = [sys.executable, "-m", "if_jax", *map(str, words)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, env=environment, **pipes))
    return processes


def _end(processes: list) -> list[str]:
    outputs = []
    for process in processes:
        try:
            outputs.append(process.communicate(timeout=600)[0])
        finally:
            process.kill()
    return outputs


def _embed(place: Path, count: int, out: str | Path, *more: str) -> list[str]:
    processes = _start(place, count, out, *more)
    outputs = _end(processes)
    assert [process.returncode for process in processes] == [0] * count, outputs
    return outputs


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("sizes", "rule", "shape"),
    [
        ((-1, 1, 1), "dp", (8, 1, 1)),
        ((-1, 4, 1), "fsdp", (2, 4, 1)),
        ((4, 16, 1), "fsdp", (1, 8, 1)),  # of a pod
        ((64, 1, 1), "dp", (8, 1, 1)),
    ],
)
def test_the_encoder_lies_on_the_devices_of_a_host(
    sizes: tuple[int, int, int], rule: str, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 16)
    assert tuple(embed.host_mesh(*sizes, sharding_rules=rule).shape.values()) == shape
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    with pytest.raises(ValueError, match="does not fit 8 device"):
        embed.host_mesh(64, 1, 1)


def test_two_processes_write_the_files_of_one(place: Path) -> None:
    first, second = _embed(place, 2, place / "two")
    assert _files(place / "two") == _files(place / "one") and len(_files(place / "one")) == 12
    assert "41 captions, exact: at most" in first and f"{place / 'two'}: 41 captions, exact" in first
    assert "captions" not in second
    assert not list(place.glob(".*.partial"))
    embeddings.Embeddings(place / "two").verify()


@pytest.mark.slow  # a dozen processes
@pytest.mark.parametrize("more", [(), ("--across-hosts", "--config.mesh.rules=fsdp", "--config.mesh.fsdp=2")])
def test_four_processes_write_the_files_of_one(place: Path, more: tuple[str, ...]) -> None:
    """With the encoder over all, each device has a row of the batch: the same to rounding, if not to the bit."""
    out = place / f"four{len(more)}"
    _embed(place, 4, out, *more)
    if not more:
        assert _files(out) == _files(place / "one")
        return
    ours, theirs = embeddings.Embeddings(out), embeddings.Embeddings(place / "one")
    assert ours.note["sha256"].keys() == theirs.note["sha256"].keys() and ours.captions == COUNT
    for number in range(COUNT):
        states = [cache.states(number, 0, f"picture number {number}").astype("f4") for cache in (ours, theirs)]
        assert np.linalg.norm(states[0] - states[1]) <= 0.02 * np.linalg.norm(states[1])


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_a_killed_process_ends_the_others_and_the_same_command_goes_on(place: Path, count: int) -> None:
    out = place / f"killed-{count}"
    processes = _start(place, count, out, heads={1: KILLED if count == 2 else KILLED.replace("== 3", "== 2")})
    outputs = _end(processes)
    assert processes[1].returncode == -signal.SIGKILL and not out.exists(), outputs
    assert all(process.returncode for process in processes), outputs
    partial = place / f".{out.name}.partial"
    complete = {path.name: path.stat().st_mtime_ns for path in partial.glob("states-*")}
    assert 4 <= len(complete) < 11
    _embed(place, count - 1, out)  # by fewer: whose a shard is does not matter
    assert _files(out) == _files(place / "one")
    assert {name: (out / name).stat().st_mtime_ns for name in complete} == complete  # not made again


@pytest.mark.slow
def test_hosts_that_share_no_disk_write_into_a_bucket(place: Path) -> None:
    with bucket.serve() as (far, variables), pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        _embed(place, 2, "gs://bucket/states")
        names = {name.removeprefix("states/"): content for name, (content, _) in far.objects.items()}
        assert names == _files(place / "one") and not far.refused


@pytest.mark.slow
def test_one_process_that_is_asked_to_end_does(place: Path) -> None:
    slow = "\nimport time\n_write = embedding_shards.CacheFolder.write\n"
    slow += "embedding_shards.CacheFolder.write = lambda *words: (time.sleep(3), _write(*words))\n"
    processes = _start(place, 2, place / "ended", heads={0: slow, 1: slow})
    partial = place / ".ended.partial"
    while not list(partial.glob(".states-*.json")):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    outputs = _end(processes)
    assert [process.returncode for process in processes] == [143, 143], outputs
    _embed(place, 2, place / "ended")
    assert _files(place / "ended") == _files(place / "one")
