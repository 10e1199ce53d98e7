"""`if-jax data index`: the same parts by whatever makes them; what is done stays done."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import record_stores
import remote_sources
from click.testing import CliRunner

from if_jax.cli_data import data
from if_jax.data import index, index_job, indexing
from if_jax.data.index_part import read_head
from if_jax.parallel import run_lock

COUNT, PER_TAR = 36, 3


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    return record_stores.write_tars(tmp_path / "tars", COUNT, PER_TAR)


def _run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(data, ["index", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def _parts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.index"))}


def test_a_source_is_indexed_once_and_reported(tars: Path) -> None:
    first = _run(tars, "--workers", 1)
    assert "0 of 12 parts are indexed, 12 to do" in first and "usable 36 of 36 records" in first and "clip: 36" in first
    parts = _parts(tars)
    assert len(parts) == 12 and not (tars / ".if_jax_rows").exists()  # the lock is gone, with its folder
    times = [path.stat().st_mtime_ns for path in sorted(tars.glob("*.index"))]
    (tars / "00004.tar.index").unlink()
    assert "11 of 12 parts are indexed, 1 to do" in _run(tars)
    assert _parts(tars) == parts
    again = [path.stat().st_mtime_ns for path in sorted(tars.glob("*.index"))]
    assert [old == new for old, new in zip(times, again, strict=True)] == [True] * 4 + [False] + [True] * 7


def test_heads_are_enough_until_decoding_is_asked_for(tars: Path) -> None:
    for check, to_do in (("headers", 12), ("headers", 0), ("decode", 12), ("decode", 0), ("headers", 0)):
        assert f"{to_do} to do" in _run(tars, "--check", check, "--workers", 1), check
    assert {read_head(path).check for path in tars.glob("*.index")} == {"decode"}


def test_what_changed_is_refused_unless_it_is_asked_for(tars: Path) -> None:
    _run(tars, "--workers", 1)
    tar = tars / "00003.tar"
    tar.write_bytes(tar.read_bytes().replace(b"number 9", b"number 8") + bytes(10240))
    line = _run(tars, code=1)
    assert "00003.tar has changed since it was indexed" in line and line.count("\n") == 1
    assert "11 of 12 parts are indexed, 1 to do" in _run(tars, "--reindex")


def test_mistakes_are_one_line(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    for arguments, words in {
        ("--runner", "FlinkRunner"): "--runner FlinkRunner needs Apache Beam, which is not installed: pip install 'if_",
        ("--", "--project=mine"): "'--project=mine' is an option for a runner of Beam: name one with --runner",
        ("--runner", "SparkRunner", "--workers", 3): "SparkRunner takes it as an option of its own",
        ("--workers", 0): "--workers 0: give at least 1",
    }.items():
        output = _run(tars, *arguments, code=1)
        assert words in output
    assert "'scenes' is drawn on the fly" in _run("scenes", code=1)
    assert "does not exist" in _run(tars / "none", code=1)
    assert not _parts(tars)


def test_a_second_job_and_a_full_disk_are_one_line(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with run_lock.locked(str(tars / ".if_jax_rows")):
        line = _run(tars, code=1)
    assert f"is at work in {tars}/.if_jax_rows: let it end, or stop it; what it has indexed stays" in line
    assert line.count("\n") == 1 and not _parts(tars)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(index, "write_part", full)
    output = _run(tars, "--workers", 1, code=1)
    assert "the index cannot be written there (No space left on device): " in output and "00000.tar.index" in output
    assert sorted(path.suffix for path in tars.rglob("*") if path.is_file()) == [".tar"] * 12


def test_a_bucket_gets_its_parts_and_keeps_no_lock(tars: Path, tmp_path: Path) -> None:
    from if_jax.data.sources import open_stored

    near = open_stored(str(tars))
    with remote_sources.served(tmp_path) as far:
        address = remote_sources.upload(far, tars, "tars")
        assert "12 to do" in _run(address, "--workers", 1)
        assert [name for name in far.objects if name.endswith(".index")] == [f"tars/{name}" for name in _parts(tars)]
        assert not [name for name in far.objects if "lock" in name]
        remote_sources.forget()
        assert "0 to do" in _run(address)
        with run_lock.locked(f"{address}/.if_jax_rows"):
            assert "is at work in gs://bucket/tars/.if_jax_rows" in _run(address, code=1)
        far.trouble = lambda request: 403 if "upload" in request or request.startswith("POST") else None
        del far.objects["tars/00002.tar.index"]
        remote_sources.forget()
        assert "gs://bucket/tars: this account may not write there (403)" in _run(address, code=1)
        far.trouble = lambda request: None
        assert open_stored(address).fingerprint() == near.fingerprint()
        assert not far.refused


@pytest.fixture
def beam_runners() -> dict[str, list[str]]:
    """Command lines of the runners that this machine has."""
    pytest.importorskip("apache_beam", reason="Apache Beam is not installed: pip install 'if_jax[beam]'")
    local = {f"direct, {count} workers": ["--runner", "DirectRunner", "--workers", str(count)] for count in (1, 2, 4)}
    loopback = ["--", "--job_endpoint=embed", "--environment_type=LOOPBACK"]
    return local | {"portable": ["--runner", "PortableRunner", *loopback]}


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "if_jax", "data", "index", *map(str, arguments)]


@pytest.mark.slow
def test_every_runner_and_number_of_workers_makes_the_same_parts(
    tars: Path, beam_runners: dict[str, list[str]]
) -> None:
    _run(tars, "--workers", 1)
    parts = _parts(tars)
    for name, options in beam_runners.items():
        for path in tars.glob("*.index"):
            path.unlink()
        made = subprocess.run(_command(tars, *options), capture_output=True, text=True, timeout=300)
        assert made.returncode == 0, made.stderr
        assert _parts(tars) == parts, name
        assert "usable 36 of 36 records" in made.stdout and "36 to" not in made.stderr and "12/12" in made.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["direct, 2 workers", "portable"])
def test_a_beam_job_that_was_killed_goes_on(name: str, tmp_path: Path, beam_runners: dict[str, list[str]]) -> None:
    tars = record_stores.write_tars(tmp_path / "tars", 600, 20)
    command = _command(tars, *beam_runners[name])
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as job:
        end = time.monotonic() + 120
        while len(_parts(tars)) < 4 and time.monotonic() < end:
            time.sleep(0.01)
        os.killpg(job.pid, signal.SIGKILL)
    done = {path: path.stat().st_mtime_ns for path in tars.glob("*.index")}
    assert 4 <= len(done) < 30
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert f"{len(done)} of 30 parts are indexed, {30 - len(done)} to do" in again.stderr
    assert len(_parts(tars)) == 30 and all(path.stat().st_mtime_ns == stamp for path, stamp in done.items())
    assert not list(tars.glob(".*.partial")) or len(list(tars.glob(".*.partial"))) <= 2  # what a kill interrupts


@pytest.mark.slow
def test_what_fails_on_a_worker_is_one_line(tars: Path, beam_runners: dict[str, list[str]]) -> None:
    _run(tars, "--workers", 1)
    tar = tars / "00003.tar"
    content = tar.read_bytes()
    tar.write_bytes(content.replace(b"number 9", b"number 8"))  # as long as before: only its worker sees it
    failed = subprocess.run(
        _command(tars, *beam_runners["portable"]), capture_output=True, text=True, timeout=300, check=False
    )
    assert failed.returncode == 1
    (line,) = [line for line in failed.stderr.splitlines() if line.startswith("Error: ")]
    assert "00003.tar has changed since it was indexed" in line
    assert line.endswith("(PortableRunner; the parts that are done stay)")


def test_the_job_makes_what_opening_makes(tars: Path) -> None:
    from if_jax.data.sources import open_stored

    opened = open_stored(str(tars))
    parts = _parts(tars)
    for path in tars.glob("*.index"):
        path.unlink()
    stored = index_job.index_source(str(tars), workers=1)
    assert _parts(tars) == parts and stored.fingerprint() == opened.fingerprint()
    assert indexing.CHECKS.keys() == {"decode", "headers"}
