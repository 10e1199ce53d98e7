"""A disk that stumbles: errors that may pass are tried again, and never become flaws of a data set."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import record_stores

from if_jax.data import reading, sources
from if_jax.data.preprocessing import Preparation
from if_jax.data.samples import StoredPictures


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PAUSES", (0.0, 0.0, 0.0))


def _failing(real: Callable[..., Any], times: int, number: int, every: int = 1) -> Callable[..., Any]:
    """A system call whose every so manieth use fails so many times in all."""
    calls = iter(range(10**9))
    left = iter(range(times))

    def call(*arguments: Any, **options: Any) -> Any:
        if next(calls) % every == 0 and next(left, None) is not None:
            raise OSError(number, os.strerror(number))
        return real(*arguments, **options)

    return call


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_an_error_that_passes_changes_nothing(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = {
        "folder": record_stores.write_folder(tmp_path / "folder" / "deep", 4).parent,
        "tars": record_stores.write_tars(tmp_path / "tars", 4, 2),
        "prepared": record_stores.write_prepared(tmp_path / "prepared", "coco", *record_stores.coco_like(3)),
    }
    whole = {kind: sources.open_stored(str(path)).fingerprint() for kind, path in stores.items()}
    for path in tmp_path.rglob("*.index*"):
        path.unlink()
    monkeypatch.setattr(os, "pread", _failing(os.pread, 5, number, every=3))
    monkeypatch.setattr(os, "scandir", _failing(os.scandir, 2, number, every=2))
    monkeypatch.setattr(Path, "read_bytes", _failing(Path.read_bytes, 4, number, every=3))
    for kind, path in stores.items():
        opened = sources.open_stored(str(path))
        assert opened.fingerprint() == whole[kind] and not opened.left_out


def test_an_error_that_stays_names_the_file_and_makes_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = record_stores.write_folder(tmp_path / "folder", 2)
    tars = record_stores.write_tars(tmp_path / "tars", 2, 2)
    monkeypatch.setattr(os, "pread", _failing(os.pread, 99, errno.EIO))
    monkeypatch.setattr(Path, "read_bytes", _failing(Path.read_bytes, 99, errno.EIO))
    for source, name in ((folder, "0000.png"), (tars, "00000.tar")):
        with pytest.raises(OSError, match=rf"Input/output error, also at try 4: check the disk.*{name}") as caught:
            sources.open_stored(str(source))
        assert caught.value.errno == errno.EIO
    assert not list(tmp_path.rglob("*.index*"))


def test_a_record_that_no_longer_decodes_is_named(tmp_path: Path) -> None:
    tars = record_stores.write_tars(tmp_path / "tars", 2, 2)
    source = StoredPictures(sources.open_stored(str(tars)), 8, 0, Preparation())
    tar = next(tars.glob("*.tar"))
    tar.write_bytes(tar.read_bytes().replace(b"JFIF", b"none").replace(b"\xff\xd8", b"\0\0"))
    with pytest.raises(ValueError, match=r"record 00000000[01] could be decoded .* no longer can \(unreadable image\)"):
        source.read([0])


def test_content_is_known_wherever_it_lies(tmp_path: Path) -> None:
    first, second = (record_stores.write_folder(tmp_path / name, 3) for name in ("job1", "job2"))
    known = [sources.open_stored(str(folder)).fingerprint() for folder in (first, second)]
    assert known[0] == known[1]
    (second / "0001.txt").write_text("Picture number 7")  # as long as before
    assert sources.open_stored(str(second), reindex=True).fingerprint() != known[0]
