"""Indexes made of heads alone: the rows of decoding for all that is sound; the rest is replaced in training."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import reading
import record_stores
import webdataset
from PIL import Image

from if_jax.data import indexing, pipeline, preprocessing, sources
from if_jax.data.index import Filter, Index
from if_jax.data.inspect import inspect
from if_jax.data.preprocessing import Preparation, UnusableRecord, read_picture, read_size
from if_jax.data.samples import _IN_A_ROW
from if_jax.data.tars import Tar

COUNT, BROKEN = 24, (3, 4, 17)


def _noise(width: int = 61, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def _cut(content: bytes) -> bytes:
    """A picture that ends after its head."""
    return content[: len(content) // 2]


def _pictures() -> dict[str, bytes]:
    turned, long = Image.Exif(), Image.Exif()
    turned[0x0112] = 6
    long[0x0112], long[0x010E] = 8, "long " * 9000  # the size stands far behind the first kilobytes
    kinds = {
        **{
            kind: record_stores.encoded(_noise(), kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
        },
        "AVIF": record_stores.encoded(_noise(), "AVIF"),
        "progressive": record_stores.encoded(_noise(), "JPEG", progressive=True),
        "palette": record_stores.encoded(_noise().convert("P"), "PNG"),
        "cmyk": record_stores.encoded(_noise().convert("CMYK"), "JPEG"),
    }
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        kinds[f"{kind} turned"] = record_stores.encoded(_noise(), kind, exif=turned)
    kinds["JPEG long"] = record_stores.encoded(_noise(), "JPEG", exif=long)
    return kinds


@pytest.mark.parametrize("kind", _pictures())
def test_the_head_tells_the_size_of_the_decoded_picture(kind: str) -> None:
    content = _pictures()[kind]
    assert read_size(content) == read_picture(content).size
    assert read_size(content)[0] in ((40,) if " " in kind else (61,))


def test_a_head_that_is_none_is_named_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for content, words in ((b"", "empty file"), (b"no picture", "unreadable"), (_pictures()["PNG"], "too many")):
        for read in (read_size, read_picture):
            with pytest.raises(UnusableRecord, match=words):
                read(content)


def test_only_a_head_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocessing, "to_rgb", None)
    big = record_stores.encoded(_noise(800, 700), "JPEG", quality=95)
    assert len(big) > 10 * preprocessing._HEAD and read_size(big[: preprocessing._HEAD]) == (800, 700)


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the pictures end too early, two of them in a row of the tar."""
    folder = tmp_path_factory.mktemp("heads") / "tars"
    folder.mkdir()
    for shard in range(2):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar")) as tar:
            for i in range(shard * COUNT // 2, (shard + 1) * COUNT // 2):
                jpeg = record_stores.encoded(_noise(24 + i), "JPEG")
                tar.write({"__key__": f"{i:04d}", "jpg": _cut(jpeg) if i in BROKEN else jpeg, "txt": f"number {i}"})
    for tar in sorted(folder.glob("*.tar")):
        indexing.index_store(Tar(tar), check="headers")
    return folder


def test_rows_are_those_of_decoding_but_for_what_cannot_be_decoded(tars: Path) -> None:
    store = Tar(tars / "00000.tar")
    fast, slow = _both(store)
    assert fast.columns.keys.equals(slow.columns.keys)
    np.testing.assert_array_equal(fast.columns.places, slow.columns.places)
    sound = [row for row in range(12) if row not in BROKEN]
    for name, column in fast.columns.facts.items():
        np.testing.assert_array_equal(column[sound], slow.columns.facts[name][sound])
    assert fast.head.flaws == ("",) and slow.head.flaws == ("", "unreadable image")
    assert np.flatnonzero(slow.columns.facts["flaw"]).tolist() == [3, 4]


def _both(store: Tar) -> tuple[Index, Index]:
    fast, slow = (indexing.build_index(store, check) for check in ("headers", "decode"))
    return Index(fast[0], held=fast[1]), Index(slow[0], held=slow[1])


def test_the_next_of_the_order_stands_in_on_every_host_and_after_every_restart(
    tars: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        whole = reading.batches(str(tars), 9)
    assert len(sources.open_stored(str(tars))) == COUNT  # they are thought sound
    names = [str(key) for batch in whole for key in batch.get("replaced", ())]
    assert set(names) == {"00000/0003", "00000/0004", "00001/0017"} and len(names) == 9  # three epochs
    assert sum("cannot be decoded" in record.getMessage() for record in caplog.records) == 3  # each is named once
    ids = np.concatenate([batch["index"] for batch in whole])
    assert not set(ids) & set(BROKEN)
    order = pipeline.open_source(str(tars), 8, 5, Preparation(), Filter())._order  # pyright: ignore
    for position, number in enumerate(ids):
        expected = next(order(p) for p in range(position, position + 9) if order(p) not in BROKEN)
        assert number == expected
    for changes in ({"shard_count": 2, "shard_index": 1}, {"workers": 2, "threads": 1}):
        part = reading.batches(str(tars), 5, 4, **changes)
        rows = slice(4, 8) if "shard_count" in changes else slice(0, 8)
        for ours, theirs in zip(part, whole[4:], strict=True):
            for name in ("image", "index", "ids"):
                np.testing.assert_array_equal(ours[name], theirs[name][rows])
            if "workers" in changes:
                assert list(ours.get("replaced", ())) == list(theirs.get("replaced", ()))


def test_decoding_leaves_them_out_and_a_sheet_leaves_them_blank(tars: Path, tmp_path: Path) -> None:
    shown = inspect(str(tars))
    assert "usable 24 of 24" in str(shown) and "3 of 24 samples cannot be decoded" in str(shown)
    copy = record_stores.write_tars(tmp_path / "copy", 3, 3)
    with webdataset.TarWriter(str(copy / "00000.tar")) as tar:
        for i in range(_IN_A_ROW):
            jpeg = record_stores.encoded(_noise(24 + i), "JPEG")
            tar.write({"__key__": f"{i:04d}", "jpg": _cut(jpeg), "txt": f"number {i}"})
    indexing.index_store(Tar(copy / "00000.tar"), check="headers")
    with pytest.raises(ValueError, match=rf"{_IN_A_ROW} pictures in a row cannot be decoded: .* data index --check"):
        reading.batches(str(copy), 1)
    with pytest.raises(ValueError, match=r"no sample of .* can be decoded"):
        inspect(str(copy))
    indexing.index_store(Tar(copy / "00000.tar"), check="decode")
    with pytest.raises(ValueError, match=r"no usable picture in .*: skipped 64: unreadable image"):
        sources.open_stored(str(copy))
