"""`if-jax doctor`: planted faults are found, each with its remedy, and a healthy set-up is told to be one."""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import bucket
import jax
import pytest
import record_stores
import remote_sources
import tiny
import tiny_recipe
from click.testing import CliRunner
from etils.epath import backend

from if_jax.checkpoints import run
from if_jax.checkpoints.release import write_stage
from if_jax.cli import main
from if_jax.config import Recipe, recipe_to_dict
from if_jax.data import pipeline
from if_jax.data.sources import open_stored
from if_jax.doctor import data_access, fit, machine, processes
from if_jax.models import presets
from if_jax.parallel import rendezvous

TESTS = Path(__file__).parent
RECIPE = tiny_recipe.arguments({})
KINDS = ("parameters", "EMA", "moments", "gradients", "activations")
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def no_tracing(monkeypatch):
    """A step that takes no memory: counting takes seconds."""
    monkeypatch.setattr(fit, "step_bytes", lambda *_, **__: dict.fromkeys(KINDS, 0))


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder to work in, with pictures; the names of the tiny nets are those of the test alone."""
    record_stores.write_folder(tmp_path / "pictures", 3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(presets.UNETS, "tiny-I", tiny.one_level(tiny.BASE))  # undone afterwards
    monkeypatch.setitem(presets.T5_ENCODERS, "tiny", tiny.TEXT)
    monkeypatch.setattr(machine, "TPU_LOCK", tmp_path / "lock")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _doctor(*more):
    result = CliRunner().invoke(main, ["doctor", *RECIPE, "--json", *map(str, more)])
    assert isinstance(result.exception, SystemExit | None), result.exception
    return result.exit_code, {row["check"]: row for row in json.loads(result.stdout)}


def test_a_healthy_set_up_passes_and_nothing_is_left(place):
    release = place / "stage_I"
    write_stage(release, tiny.on_one_level(tiny.stages()[0]))
    before = sorted(place.rglob("*"))
    keys = ["--config.text_encoder_from=stage_I", "--config.data.source=0.5*pictures + 0.5*scenes"]
    keys += ["--config.validation.every=5"]
    code, rows = _doctor("--workdir", "runs/I", *keys, f"--config.init_from={release}")
    assert code == 0 and {row["status"] for row in rows.values()} == {"pass"}, rows
    assert not any(row["remedy"] for row in rows.values())
    assert list(rows) == [
        *("versions", "TPU lock", "recipe", "devices", "run folder", "run", "text encoder", "initial weights"),
        *("data", "validation data", "mesh", "batch", "memory", "disk space"),
    ]
    assert sorted(place.rglob("*")) == before


def test_the_report_is_one_line_a_check(no_tracing):
    result = CliRunner().invoke(main, ["doctor", *RECIPE, "--config.mesh.data=3"])
    lines = result.output.splitlines()
    assert result.exit_code == 1 and [line[:4] for line in lines].count("fail") == 1
    (line,) = (line for line in lines if line.startswith("fail"))
    assert line.startswith("fail mesh: mesh data=3, fsdp=1, tensor=1 does not fit 8 device(s) → the product must be 8")


def test_without_a_recipe_the_machine_is_looked_at():
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0 and [line.split(":")[0] for line in result.output.splitlines()] == [
        *("pass versions", "pass TPU lock", "pass devices")
    ]


FAULTS = {
    "recipe key": (["--config.bacth_size=3"], "recipe", "bacth_size", "did you mean batch_size?"),
    "recipe value": (["--config.stage=bse"], "recipe", "stage is 'bse'", "it must be one of base, super-resolution"),
    "mesh": (["--config.mesh.fsdp=3"], "mesh", "does not fit 8 device(s)", "set one axis to -1"),
    "batch": (["--config.batch_size=12"], "batch", "does not divide over 8 devices", "use a multiple of 8, e.g. 8"),
    "text encoder": (["--config.text_encoder_from=gone"], "text encoder", "gone", "copy"),
    "initial weights": (["--config.init_from=gone"], "initial weights", "gone", "set --config.init_from"),
    "data": (["--config.data.source=gone"], "data", "'gone' does not exist", "give a folder, tar files"),
    "drawn by workers": (["--config.data.workers=2"], "data", "workers 2 with 'scenes'", "give workers 0"),
    "validation data": (
        ["--config.validation.every=5", "--config.validation.source=gone"],
        *("validation data", "'gone' does not exist", "give a folder"),
    ),
    "text states": (
        ["--config.data.embeddings=gone", "--config.text_encoder_from=gone"],
        *("text states", "'gone' is no cache", "if-jax embed"),
    ),
    "run folder": (["--workdir", "/dev/null/run"], "run folder", "Not a directory", "choose another --workdir"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_command_is_found(fault, no_tracing):
    arguments, check, message, remedy = FAULTS[fault]
    code, rows = _doctor(*arguments)
    assert code == 1 and rows[check]["status"] == "fail", rows
    assert message in rows[check]["message"] and remedy in rows[check]["remedy"], rows[check]
    others = [row for name, row in rows.items() if name != check and row["status"] != "pass"]
    assert [row["check"] for row in others] == (["text encoder"] if fault == "text states" else [])


def test_jax_and_what_belongs_to_it(monkeypatch):
    real = metadata.version
    for name, version, status in (("jaxlib", "0.4.1", "fail"), ("libtpu", "0.0.1", "fail"), ("libtpu", "9.0", "warn")):
        own = {name: version}
        monkeypatch.setattr(metadata, "version", lambda package, own=own: own.get(package) or real(package))
        finding = machine.versions()
        assert finding.status == status and f"{name} {version} does not belong to jax" in finding.message
        assert finding.remedy.startswith('pip install -U "jax') and f"=={jax.__version__}" in finding.remedy
    monkeypatch.setattr(metadata, "version", lambda package: {"jaxlib": "0.4.1"}.get(package) or real(package))
    code, rows = _doctor()
    assert code == 1 and list(rows) == ["versions"]  # nothing after it could be trusted


def test_who_holds_the_tpu_is_named_and_left_alone(place, monkeypatch):
    held = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", held, str(machine.TPU_LOCK)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        holder.stdout.readline()
        assert machine.tpu_lock().status == "warn"  # JAX_PLATFORMS is cpu: it does not matter here
        monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
        code, rows = _doctor()
        assert code == 1 and rows["TPU lock"]["status"] == "fail" and "devices" not in rows
        assert (
            f"process {holder.pid} (" in rows["TPU lock"]["message"] and "import fcntl" in rows["TPU lock"]["message"]
        )
        assert f"kill {holder.pid}" in rows["TPU lock"]["remedy"] and holder.poll() is None
        holder.communicate(b"\n")
    assert machine.tpu_lock().status == "pass"
    with open(machine.TPU_LOCK, "rb") as file:  # and looking does not take the lock
        fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_an_accelerator_that_is_not_used(monkeypatch):
    monkeypatch.setattr(machine, "idle_accelerators", lambda: "4 TPU chip(s)")
    finding, devices = machine.devices()
    assert finding.status == "warn" and "JAX uses the CPU, but there is 4 TPU" in finding.message and len(devices) == 8
    assert finding.remedy == "unset JAX_PLATFORMS (it is cpu)"
    monkeypatch.delenv("JAX_PLATFORMS")
    assert machine.devices()[0].remedy == 'pip install "if_jax[tpu]"'


def test_devices_that_do_not_answer(monkeypatch):
    answer = threading.Event()
    monkeypatch.setattr(jax, "devices", answer.wait)
    finding, devices = machine.devices(0.1)
    answer.set()
    assert finding.status == "fail" and devices is None and "on all workers at once" in finding.remedy
    monkeypatch.setattr(jax, "devices", lambda: [][0])
    assert machine.devices()[0].status == "fail"


def test_a_full_disk(monkeypatch):
    sizes = dict.fromkeys(KINDS, 4_000_000_000)
    monkeypatch.setattr(fit, "step_bytes", lambda *_, **__: sizes)
    monkeypatch.setattr(machine, "system_memory", lambda: 10**13)
    for free, status, message in ((10**10, "fail", "one checkpoint takes 12.0"), (2 * 10**10, "warn", "take 36.0 GB")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(10**12, 0, free))
        code, rows = _doctor("--workdir", "run")
        assert rows["disk space"]["status"] == status and code == (status == "fail")
        assert message in rows["disk space"]["message"] and "keep_checkpoints" in rows["disk space"]["remedy"]


def test_a_recipe_that_does_not_fit(monkeypatch):
    sizes = dict.fromkeys(KINDS, 10**9)
    monkeypatch.setattr(fit, "step_bytes", lambda *_, **__: sizes)
    monkeypatch.setattr(machine, "system_memory", lambda: 8 * 3 * 10**9)  # for eight devices
    code, rows = _doctor()
    assert code == 1 and "the state alone exceeds the 3.0 GB" in rows["memory"]["message"]
    assert "--config.mesh.rules=fsdp" in rows["memory"]["remedy"]
    for activations, status in ((5 * 10**9, "pass"), (11 * 10**9, "warn"), (30 * 10**9, "fail")):
        finding = fit.compare_memory(sizes | {"activations": activations}, 15 * 10**9, True, Recipe(accumulate=2))
        assert finding.status == status and (status == "pass" or finding.remedy.startswith("--config.accumulate=4"))


def test_a_run_folder_of_another_recipe(monkeypatch, no_tracing):
    recipe = recipe_to_dict(Recipe()) | {"prediction": "x0"}
    monkeypatch.setattr(run, "read_latest", lambda workdir: (7, {"recipe": recipe}))
    code, rows = _doctor("--workdir", "run")
    assert code == 1 and rows["run"]["status"] == "fail" and "holds a run of another recipe" in rows["run"]["message"]
    assert "prediction was 'x0', is 'v'" in rows["run"]["message"]


def test_a_bucket_without_its_library(monkeypatch, no_tracing):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    for protocol in ("gs", "gcs"):  # where another test has opened a bucket
        monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, protocol, raising=False)
    backend.fsspec_backend._get_filesystem.cache_clear()
    code, rows = _doctor("--workdir", "gs://no-such-bucket-of-ours/run")
    assert code == 1 and rows["run folder"]["remedy"] == "pip install gcsfs"


def test_a_source_that_has_changed_or_holds_no_picture(place, no_tracing):
    open_stored("pictures")
    assert "3 pictures" in _doctor("--config.data.source=pictures")[1]["data"]["message"]
    (place / "pictures" / "more.txt").write_text("no picture beside it")
    shutil.copy(next((place / "pictures").glob("*.png")), place / "pictures" / "more.png")
    code, rows = _doctor("--config.data.source=pictures")
    assert code == 1 and "has changed since it was indexed" in rows["data"]["message"]
    assert "--reindex" in rows["data"]["remedy"]
    (place / "empty").mkdir()
    (place / "empty" / "bad.png").write_bytes(b"")
    code, rows = _doctor("--config.data.source=empty")
    assert code == 1 and "no usable picture" in rows["data"]["message"] and "data inspect" in rows["data"]["remedy"]


def test_the_fingerprint_is_of_names_and_sizes(place):
    shutil.copytree(place / "pictures", place / "copy")  # another host's: the same names and sizes, other times
    for path in (place / "copy").iterdir():
        os.utime(path, (1, 1))
    fingerprint = pipeline.describe_files("pictures")
    assert fingerprint == pipeline.describe_files("copy") == pipeline.describe_files("0.5*copy + 0.5*scenes")
    record_stores.write_tars(place / "tars", 5, 2)
    assert pipeline.describe_files("tars").startswith("3 files, ")
    assert pipeline.describe_files("scenes") == "drawn" and "does not exist" in pipeline.describe_files("gone")
    with next((place / "copy").glob("*.png")).open("ab") as file:
        file.write(b"\0")
    assert pipeline.describe_files("copy") != fingerprint


def test_hosts_that_differ_are_named_with_what_differs():
    first = {"host": "a", "code": "1", "recipe": "2", "data": "8 files, 1", "devices": 4, "workdir": "r"}
    assert processes.compare_facts([first, first | {"host": "b"}])[0].status == "pass"
    for name, remedy in processes._REMEDIES.items():
        if name in first:
            (finding,) = processes.compare_facts([first, first, first | {"host": "c", name: "other"}])
            assert finding.status == "fail" and f"process 2 on c has {name} 'other'" in finding.message
            assert finding.remedy == remedy
    assert len(processes.compare_facts([first, first | {"code": "0", "data": "7 files, 1"}])) == 2


def _free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def _meet(problems, seconds):
    """Findings of processes that run side by side, by their problems; one whose problem is None does not come."""
    coordinator, count = f"localhost:{_free_port()}", len(problems)
    findings = {}

    def come(index):
        address = rendezvous.Address(coordinator, count, index)
        findings[index] = processes.all_present(address, seconds, problems[index])

    threads = [threading.Thread(target=come, args=(i,)) for i in range(count) if problems[i] is not None]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return findings


def test_processes_that_come_together():
    findings = _meet(["", "", ""], 20)
    assert all(met and finding.status == "pass" for finding, met in findings.values()), findings


def test_a_process_that_does_not_come_is_named_on_all():
    for finding, met in _meet(["", None, ""], 1).values():
        assert not met and finding.status == "fail" and "process 1 of 3 has not come" in finding.message
        assert "start it there" in finding.remedy


def test_a_process_that_cannot_go_on_tells_the_others():
    for finding, met in _meet(["", "fail TPU lock: process 7 holds it"], 20).values():
        assert not met and "process 1 on" in finding.message and "process 7 holds it" in finding.message


def test_an_address_that_leads_nowhere():
    port = _free_port()
    finding, met = processes.all_present(rendezvous.Address(f"localhost:{port}", 2, 1), 0.3, "")
    assert not met and f"localhost:{port} cannot be reached" in finding.message and "firewall" in finding.remedy
    with socket.create_server(("", port)):
        finding, met = processes.all_present(rendezvous.Address(f"localhost:{port}", 2, 0), 0.3, "")
    assert not met and f"port {port} cannot be opened here" in finding.message and "another port" in finding.remedy
    finding, met = processes.all_present(rendezvous.Address("host", 2, 1), 0.3, "")
    assert not met and finding.remedy == "write HOST:PORT"


@pytest.mark.parametrize(("other", "message"), [((2, 0), "has come twice"), ((3, 1), "was told of 3 processes")])
def test_processes_that_were_started_wrongly(other, message):
    coordinator, count = f"localhost:{_free_port()}", 3 if other == (2, 0) else 2
    errors = []

    def come(processes, index):
        address = rendezvous.Address(coordinator, processes, index)
        try:
            rendezvous.exchange_payloads(address, {"host": "here", "problem": ""}, 5)
        except ValueError as error:
            errors.append(str(error))

    calls = [(count, 0), (count, 1), (count, 1)] if other == (2, 0) else [(2, 0), other]
    threads = [threading.Thread(target=come, args=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == len(calls) and all(message in error for error in errors), errors


def test_two_processes_whose_data_differ(place):
    """Real processes: they meet, join, see each other's devices, and each names what differs."""
    address = f"localhost:{_free_port()}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    record_stores.write_folder(place / "other" / "pictures", 4)
    command = [sys.executable, "-m", "if_jax", "doctor", *RECIPE, "--json"]
    command += ["--workdir", str(place / "run"), "--config.data.source=pictures", "--coordinator", address]
    command += ["--processes", "2", "--process"]
    started = [
        subprocess.Popen([*command, str(i)], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
        for i, folder in enumerate((place, place / "other"))
    ]
    for process in started:
        out = process.communicate(timeout=300)[0]
        assert process.returncode == 1, out
        bad = [row for row in json.loads(out) if row["status"] != "pass"]
        assert [row["check"] for row in bad] == ["hosts"] and "has data '8 files" in bad[0]["message"], bad
        assert "process 0 on" in bad[0]["message"] and "copy the same files" in bad[0]["remedy"]
        assert "2 × cpu" in out and "all processes see" in out
    assert not list(place.glob(".if_jax*"))


@pytest.mark.parametrize(
    ("region", "location", "parts", "same"),
    [
        ("us-east5", "US-EAST5", (), True),
        ("us-east5", "US-EAST1", (), False),
        ("us-east5", "US", (), True),
        ("europe-west4", "US", (), False),
        ("us-east1", "NAM4", (), True),
        ("us-east5", "NAM4", (), False),
        ("us-east5", "US", ("US-EAST5", "US-EAST1"), True),
        ("us-west4", "US", ("US-EAST5", "US-EAST1"), False),
        ("us-west4", "MARS7", (), None),
    ],
)
def test_regions_of_buckets(region, location, parts, same):
    assert data_access.compare_regions(region, location, parts) is same


def test_data_in_a_bucket_are_read_before_it_costs_money(place, no_tracing, monkeypatch):
    monkeypatch.setattr(data_access, "_SECONDS", 0.2)
    tars = record_stores.write_tars(place / "tars", 20, 10)
    with remote_sources.served(place) as far, bucket.metadata_server("us-east5-b") as host:
        monkeypatch.setenv("GCE_METADATA_HOST", host)
        source = f"--config.data.source={remote_sources.upload(far, tars, 'tars')}"
        far.location = "US-EAST5"
        code, rows = _doctor("--data-only", source)
        assert code == 0 and list(rows) == ["data speed", "data region"]
        speed, batch = re.fullmatch(
            r"gs://bucket/tars: ([\d.,]+) MB/s on this host; its part of a batch is (\S+) MB, .* every \S+ s",
            rows["data speed"]["message"],
        ).groups()
        sizes = [len(content) for name, (content, _) in far.objects.items() if name.endswith(".tar")]
        assert float(speed) > 0 and float(batch) == pytest.approx(8 * sum(sizes) / 20 / 1e6, rel=0.3)
        assert rows["data region"]["message"] == "gs://bucket is in US-EAST5, this machine in us-east5"
        far.location = "EUROPE-WEST4"
        code, rows = _doctor(source)
        assert code == 0 and rows["data region"]["status"] == "warn" and "data speed" in rows
        assert re.search(r"every pass over it is [\d.]+ MB of traffic between regions", rows["data region"]["message"])
        assert "copy it to a bucket in us-east5" in rows["data region"]["remedy"]
        far.trouble = lambda request: 403 if request == "GET /storage/v1/b/bucket" else None
        _, rows = _doctor("--data-only", source)
        assert rows["data region"]["message"].startswith("this account may not see where gs://bucket lies")
        far.trouble = lambda request: 403
        code, rows = _doctor("--data-only", source)
        assert code == 1 and "Storage Object Viewer" in rows["data speed"]["remedy"]
        assert _doctor("--data-only")[1]["data"]["message"] == "scenes: not in a bucket"
