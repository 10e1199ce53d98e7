"""Records are taken out by a list, without a look at the pictures, and counted."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import pytest
import record_stores
import webdataset
from click.testing import CliRunner

from if_jax.cli_data import data
from if_jax.data import indexing, sources


def _write(path: Path, count: int, per_tar: int) -> Path:
    path.mkdir()
    for first in range(0, count, per_tar):
        with webdataset.TarWriter(str(path / f"{first // per_tar:05d}.tar")) as tar:
            for i in range(first, first + per_tar):
                known = {"caption": f"picture {i}", "url": f"https://example.com/{i}.jpg"}
                picture = record_stores.encoded(record_stores.picture(i), "JPEG")
                tar.write({"__key__": f"{i:04d}", "jpg": picture, "json": json.dumps(known).encode()})
    return path


def test_a_list_takes_records_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tars = _write(tmp_path / "tars", 12, 4)
    whole = sources.open_stored(str(tars))
    monkeypatch.setattr(indexing, "build_index", None)  # nothing is indexed again
    taken = tmp_path / "taken.txt"
    hashed = hashlib.sha256(b"https://example.com/5.jpg").hexdigest()
    taken.write_text(
        f"# opted out\n\n0001\n00002/0009\n00002/0001\n{hashed}\nhttps://example.com/7.jpg\nhttps://a.b/c\n"
    )
    opened = sources.open_stored(str(tars), exclude=str(taken))
    kept = [i for i in range(12) if i not in (1, 5, 7, 9)]
    assert [opened.key(row) for row in range(len(opened))] == [whole.key(i) for i in kept]
    assert opened.left_out == {"in data.exclude": ["00000: 0001", "00001: 0005", "00001: 0007", "00002: 0009"]}
    assert opened.fingerprint() != whole.fingerprint()
    arguments = ["inspect", str(tars), "--exclude", str(taken), "--sheet", str(tmp_path / "sheet.png")]
    output = CliRunner().invoke(data, arguments, catch_exceptions=False).output
    assert "usable 8 of 12 records" in output and "skipped 4: in data.exclude (00000: 0001, 00001: 0005," in output


def test_a_list_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    tars = _write(tmp_path / "tars", 2, 2)
    (tmp_path / "picture.png").write_bytes(record_stores.encoded(record_stores.picture(0)))
    (tmp_path / "all.txt").write_text("0000\n0001\n")
    for name, words in {
        "missing.txt": "data.exclude .*missing.txt' is no file: give one of keys",
        "picture.png": "is no text",
        "all.txt": r"no usable picture in .*: skipped 2: in data.exclude \(0000, 0001\)",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            sources.open_stored(str(tars), exclude=str(tmp_path / name))


def test_an_empty_list_takes_nothing_out(tmp_path: Path) -> None:
    tars = _write(tmp_path / "tars", 2, 2)
    (tmp_path / "none.txt").write_bytes(io.BytesIO().getvalue())
    assert len(sources.open_stored(str(tars), exclude=str(tmp_path / "none.txt"))) == 2
