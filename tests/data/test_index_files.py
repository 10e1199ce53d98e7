"""Indexes as files: the same rows mapped as held, kept whole or not at all, and named where they are of no use."""

from __future__ import annotations

import errno
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reading
import record_stores

from if_jax.data import index, index_part, parts_table, records, selection, sources
from if_jax.data.index import Filter

COUNT, PER_TAR = 40, 3
KEEP = Filter(min_clip=0.205, max_watermark=0.75)


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = record_stores.write_tars(tmp_path_factory.mktemp("index_files") / "tars", COUNT, PER_TAR)
    sources.open_stored(str(folder))
    return folder


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every source counts as a large one, and filters walk through parts in spans."""
    monkeypatch.setattr(selection, "_WORTH_KEEPING", 0)
    monkeypatch.setattr(parts_table, "_WORTH_KEEPING", 0)
    monkeypatch.setattr(index, "_SPAN", 2)


def _kept(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / selection.FOLDER).iterdir())}


def test_mapped_rows_are_those_held_in_memory(tars: Path, large: None, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped = sources.open_stored(str(tars), KEEP)
    monkeypatch.setattr(selection, "_WORTH_KEEPING", 2**20)
    monkeypatch.setattr(index, "_SPAN", 2**20)
    held = sources.open_stored(str(tars), KEEP)
    assert mapped.selection.file and not held.selection.file and 10 < len(held) < COUNT
    assert mapped.fingerprint() == held.fingerprint()
    assert mapped.skipped == held.skipped
    assert {reason: len(names) for reason, names in held.left_out.items()} == {
        reason: skipped.total for reason, skipped in held.skipped.items()
    }
    for number in range(len(held)):
        assert mapped.place(number) == held.place(number) and mapped.key(number) == held.key(number)
        assert mapped[number] == held[number]
    for field in ("width", "content", "clip"):
        np.testing.assert_array_equal(mapped.facts(field), held.facts(field))
    with pytest.raises(IndexError, match=f"record {len(held)} of {len(held)}"):
        mapped[len(held)]


def test_what_is_kept_is_opened_without_a_look_at_rows(
    tars: Path, large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sources.open_stored(str(tars), KEEP)
    for place in ((index.Index, "_select"), (index, "read_head"), (index_part, "_columns")):
        monkeypatch.setattr(*place, None)
    index_part._map.cache_clear()
    again = sources.open_stored(str(tars), KEEP)
    assert again.fingerprint() == first.fingerprint() and again.skipped == first.skipped
    np.testing.assert_array_equal(again.selection.rows, first.selection.rows)


def test_every_filter_and_list_has_rows_of_its_own(tars: Path, large: None, tmp_path: Path) -> None:
    (tmp_path / "taken.txt").write_text("00001/000010004\n000020007\n")
    opened = [
        sources.open_stored(str(tars)),
        sources.open_stored(str(tars), Filter(min_clip=0.21)),
        sources.open_stored(str(tars), exclude=str(tmp_path / "taken.txt")),
    ]
    assert len({stored.selection.file for stored in opened}) == 3
    assert [len(stored) for stored in opened] == [COUNT, COUNT - 10, COUNT - 2]


def test_half_of_the_rows_is_none(tars: Path, large: None) -> None:
    whole = sources.open_stored(str(tars), KEEP)
    assert whole.selection.file
    content = whole.selection.file.read_bytes()
    for damaged in (content[:-4], b""):
        whole.selection.file.unlink()
        whole.selection.file.write_bytes(damaged)
        assert sources.open_stored(str(tars), KEEP).selection.rows.tobytes() == content
    selection._note(whole.selection.file).write_text("{}")
    assert sources.open_stored(str(tars), KEEP).fingerprint() == whole.fingerprint()


def test_a_mapped_source_travels_small_and_trains_alike(
    tars: Path, large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = sources.open_stored(str(tars))
    size = len(pickle.dumps(opened))
    opened.selection.rows[0]  # mapped, which must not travel
    assert len(pickle.dumps(opened)) == size
    there = pickle.loads(pickle.dumps(opened))
    np.testing.assert_array_equal(there.selection.rows, opened.selection.rows)
    large_batches = reading.batches(str(tars), 12)
    monkeypatch.setattr(selection, "_WORTH_KEEPING", 2**20)
    for ours, theirs in zip(large_batches, reading.batches(str(tars), 12), strict=True):
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_a_changed_store_is_refused_in_spite_of_the_table(tmp_path: Path, large: None) -> None:
    tars = record_stores.write_tars(tmp_path / "tars", 9, 3)
    first = sources.open_stored(str(tars))
    assert [name for name in _kept(tars) if name.startswith("parts-")]
    tar = tars / "00001.tar"
    tar.write_bytes(tar.read_bytes().replace(b"picture number 3", b"picture number 8 "[:16]) + bytes(512))
    with pytest.raises(ValueError, match=r"00001.tar has changed since it was indexed.*--reindex"):
        sources.open_stored(str(tars))
    again = sources.open_stored(str(tars), reindex=True)
    assert again.fingerprint() != first.fingerprint() and again.selection.file != first.selection.file
    with pytest.raises(ValueError, match=r"00001.tar.index' was made anew while it was in use: start again"):
        index_part._map.cache_clear()
        first.key(4)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.97, 0.9999])
def test_a_part_that_is_cut_off_is_named_and_made_again(
    share: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tars = record_stores.write_tars(tmp_path / "tars", 6, 3)
    first = sources.open_stored(str(tars))
    part = tars / "00001.tar.index"
    whole = part.read_bytes()
    part.unlink()  # as a copy that ended too early: never in the place of a file that is mapped
    part.write_bytes(whole[: int(len(whole) * share)])
    with caplog.at_level(logging.WARNING):
        assert sources.open_stored(str(tars)).fingerprint() == first.fingerprint()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"{part} is cut off or damaged: {tars / '00001.tar'} is indexed again"
    assert part.read_bytes() == whole  # the same rows are the same bytes


@pytest.mark.parametrize("kind", ["tars", "folder", "prepared"])
def test_an_index_of_another_version_is_named_and_made_again(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = {
        "tars": lambda path: record_stores.write_tars(path, 4, 4),
        "folder": lambda path: record_stores.write_folder(path, 4),
        "prepared": lambda path: record_stores.write_prepared(path, "coco", *record_stores.coco_like(4)),
    }[kind]
    folder = write(tmp_path / "data")
    name = {"tars": "00000.tar.index", "folder": ".if_jax_index", "prepared": ".train.index"}[kind]
    (folder / f"{name}.npz").write_bytes(b"of version 3")
    with caplog.at_level(logging.WARNING):
        opened = sources.open_stored(str(folder))
    assert len(opened) == 4 and not opened.left_out
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"{name}.npz is an index of another version: {folder}" in line and line.endswith("is indexed again, once")
    caplog.clear()
    monkeypatch.setattr(index_part, "VERSION", index_part.VERSION + 1)
    sources.open_stored(str(folder))
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"{name} is of another version: {folder}" in line


def test_a_full_disk_is_named_and_leaves_nothing_behind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, large: None
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tars = record_stores.write_tars(tmp_path / "tars", 6, 6)
    plain = sources.open_stored(str(tars))
    third = plain[3]
    for path in [*tars.glob("*.index"), *(tars / selection.FOLDER).iterdir()]:
        path.unlink()
    index_part._map.cache_clear()
    real_part, real_open = index.write_part, open

    def full(sink: str, *rest: Any) -> None:
        real_part(sink, *rest)
        os.truncate(sink, 100)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Full:
        def __init__(self, path: Path, mode: str) -> None:
            self.file = real_open(path, mode)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def write(self, content: memoryview) -> None:
            self.file.write(content)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(index, "write_part", full)
    monkeypatch.setattr(selection, "open", Full, raising=False)
    with caplog.at_level(logging.WARNING):
        opened = sources.open_stored(str(tars))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3 and all("No space left on device" in line and "\n" not in line for line in lines)
    assert lines[0].startswith(f"the index of {tars / '00000.tar'} cannot be kept")
    assert opened.fingerprint() == plain.fingerprint() and opened[3] == third
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".tar"]


def test_rows_that_take_64_bits_are_kept_too(tars: Path, large: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_kind", lambda total: np.dtype("<u8"))
    monkeypatch.setattr(selection, "_VERSION", 99)
    opened = sources.open_stored(str(tars), KEEP)
    assert opened.selection.rows.dtype == np.uint64
    np.testing.assert_array_equal(
        opened.facts("content"), [records.hash_content(r.picture, r.captions) for r in opened]
    )
