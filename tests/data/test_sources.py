"""Stored records: every kind of record store read in place, the same ids for every reader, and every loss named."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import record_stores
import tensorflow_datasets as tfds
import webdataset
from reading import Batch, batches, batches_by

from if_jax.data import indexing, mixtures, samples, sources
from if_jax.data.index import Filter
from if_jax.data.preprocessing import Preparation

COUNT = 23


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("stored")
    return {
        "folder": str(record_stores.write_folder(root / "folder", COUNT)),
        "tars": str(record_stores.write_tars(root / "tars", COUNT, 10)),
        "prepared": str(record_stores.write_prepared(root / "prepared", "coco", *record_stores.coco_like(COUNT))),
        "mixture": f"1*{root / 'folder'} + 3*{root / 'tars'}",
    }


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[ProcessPoolExecutor]]:
    """Four real processes, started once for all sources."""
    fresh = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(ProcessPoolExecutor(1, mp_context=fresh)) for _ in range(4)]


@pytest.mark.parametrize("number", ["9" * 400, int("9" * 400), "1e60", "much"])
def test_a_score_that_no_float_holds_is_none(number):
    assert np.isnan(indexing._score({"similarity": number}, ("similarity",)))
    assert indexing._score({"CLIP": number, "similarity": "0.5"}, ("CLIP", "similarity")) == 0.5


@pytest.mark.parametrize("kind", ["folder", "tars", "prepared", "mixture"])
def test_the_first_thousand_ids_are_the_same_in_one_two_and_four_processes_and_after_a_restart(
    kind: str, stored: dict[str, str], hosts: list[ProcessPoolExecutor]
) -> None:
    steps, many = 25, {"batch_size": 40}  # 1,000 samples
    step = int(np.random.default_rng(3).integers(2, steps - 5))
    by_count = {  # the first thing asked for: four processes open, and index, a source that no one has opened
        count: [
            hosts[i].submit(batches_by, stored[kind], steps, shard_index=i, shard_count=count, **many)
            for i in range(count)
        ]
        for count in (4, 2)
    }
    restarted = hosts[3].submit(batches_by, stored[kind], steps - step, step, **many)
    whole = batches(stored[kind], steps, **many)
    ids = np.concatenate([batch["index"] for batch in whole])
    assert len(ids) == 1000
    for count, parts in by_count.items():
        processes, rows = zip(*(part.result() for part in parts), strict=True)
        assert len({os.getpid(), *processes}) == 1 + count
        assert all(_equal(whole[k], _joined([part[k] for part in rows])) for k in range(steps))
    _, again = restarted.result()
    assert all(_equal(a, b) for a, b in zip(again, whole[step:], strict=True))
    if kind != "mixture":
        epochs = ids[: len(ids) // COUNT * COUNT].reshape(-1, COUNT)
        assert (np.sort(epochs, axis=1) == np.arange(COUNT)).all()
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def _joined(parts: list[Batch]) -> Batch:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _equal(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_worker_processes_give_the_same_batches(stored: dict[str, str]) -> None:
    alone = batches(stored["tars"], 5, 2)
    made = batches(stored["tars"], 5, 2, workers=2)
    assert all(_equal(a, b) for a, b in zip(alone, made, strict=True))
    with pytest.raises(ValueError, match="workers 1 with 'scenes'"):
        batches("scenes", 1, workers=1)


def test_every_store_gives_picture_and_captions_by_number(stored: dict[str, str]) -> None:
    for kind in ("folder", "tars", "prepared"):
        opened = sources.open_stored(stored[kind])
        assert len(opened) == COUNT and not opened.left_out
        assert (opened.facts("width") == record_stores.SIDE + 4).all()
        assert "7" in opened[7].captions[0]
    tars = sources.open_stored(stored["tars"])
    assert tars.key(12) == "00001/000010012" and tars[12].metadata["similarity"] == pytest.approx(0.212)
    assert sources.open_stored(stored["prepared"])[4].captions == tuple(f"caption {k} of 4" for k in range(3))


def test_a_mixture_keeps_its_weights_and_walks_through_every_part(stored: dict[str, str]) -> None:
    ids = np.concatenate([batch["index"] for batch in batches(stored["mixture"], 46)])
    part = ids // 2**48
    assert abs((part == 1).mean() - 0.75) < 0.01
    for which in (0, 1):
        own = (ids % 2**48)[part == which]
        assert sorted(own[:COUNT]) == list(range(COUNT))
    for wrong in ("0.5*scenes + tasks", "0*scenes + 1*tasks"):
        with pytest.raises(ValueError, match="mixture"):
            mixtures.parse_mixture(wrong)


def test_several_captions_take_turns(stored: dict[str, str]) -> None:
    source = samples.StoredPictures(sources.open_stored(stored["prepared"]), 8, 0, Preparation())
    read = source.read(range(3 * COUNT))
    assert {sample.choice for sample in read} == {0, 1, 2}
    assert all(sample.caption == f"caption {sample.choice} of {sample.number}" for sample in read)


def test_filters_use_the_columns_there_are(stored: dict[str, str]) -> None:
    clear = sources.open_stored(stored["tars"], Filter(min_clip=0.205, max_watermark=0.45))
    assert len(clear) == 8 and all(record.metadata["pwatermark"] < 0.45 for record in clear)
    counts = Counter({reason: len(keys) for reason, keys in clear.left_out.items()})
    assert counts == {"CLIP score below 0.205": 5, "watermark above 0.45": 10} and len(clear) + counts.total() == COUNT
    assert len(sources.open_stored(stored["folder"], Filter(min_clip=0.9))) == COUNT  # no such column: all pass
    with pytest.raises(ValueError, match=r"no usable picture in .*: skipped 23: longer than 1.1 times its width"):
        sources.open_stored(stored["folder"], Filter(max_aspect=1.1))


def test_a_tar_that_is_not_as_it_should_be(tmp_path: Path) -> None:
    whole = next(record_stores.write_tars(tmp_path / "whole", 6, 6).glob("*.tar"))
    content, ends = whole.read_bytes(), "tar is damaged or ends too early: samples after this are lost"
    with tarfile.open(whole) as tar:
        third = next(member for member in tar if member.name.endswith("0002.jpg"))
    cut, boundary, rubbish = (tmp_path / f"{name}.tar" for name in ("cut", "boundary", "rubbish"))
    cut.write_bytes(content[: third.offset_data + 100])
    boundary.write_bytes(content[: third.offset])
    rubbish.write_bytes(b"no tar at all" * 100)
    for path in (cut, boundary):
        opened = sources.open_stored(str(path))
        assert len(opened) == 2 and ends in opened.left_out
    with pytest.raises(ValueError, match=r"no usable picture.*tar is damaged"):
        sources.open_stored(str(rubbish))
    tarfile.open(tmp_path / "empty.tar", "w").close()
    with pytest.raises(ValueError, match=r"no usable picture in .*: it is empty"):
        sources.open_stored(str(tmp_path / "empty.tar"))
    bare = tmp_path / "bare.tar"
    with webdataset.TarWriter(str(bare)) as tar:
        for i in range(3):
            tar.write({"__key__": str(i), "png": record_stores.encoded(record_stores.picture(i))})
    with pytest.raises(ValueError, match=r"no usable picture in .*: skipped 3: no caption"):
        sources.open_stored(str(bare))


def test_of_duplicate_keys_the_first_sound_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "twice.tar"
    files = [("a.png", b"rot"), ("a.txt", b"first a"), ("b.png", None), ("b.txt", b"first b"), ("a.png", None)]
    files += [("a.txt", b"second a"), ("b.png", None), ("b.txt", b"second b"), ("README", b"no sample")]
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            data = record_stores.encoded(record_stores.picture(1)) if data is None else data
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    opened = sources.open_stored(str(path))
    assert [record.captions[0] for record in opened] == ["first b", "second a"]
    expected = {"unreadable image": ["a"], "duplicate key": ["b"], "name without an extension": ["README"]}
    assert opened.left_out == expected


def test_an_index_is_made_once_and_a_changed_store_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = next(record_stores.write_tars(tmp_path / "tars", 4, 4).glob("*.tar"))
    first = sources.open_stored(str(tar))
    with monkeypatch.context() as patch:
        patch.setattr(indexing, "build_index", None)  # a second look would fail
        assert sources.open_stored(str(tar)).fingerprint() == first.fingerprint()
    os.utime(tar, ns=(0, tar.stat().st_mtime_ns + 1))  # as in a copy: looked through again, and the same
    assert sources.open_stored(str(tar)).fingerprint() == first.fingerprint()
    tar.write_bytes(tar.read_bytes().replace(b"picture number 3", b"picture number 4"))  # as long as before
    os.utime(tar, ns=(0, tar.stat().st_mtime_ns + 2))
    with pytest.raises(ValueError, match=r"has changed since it was indexed.*--reindex") as caught:
        sources.open_stored(str(tar))
    assert "\n" not in str(caught.value)
    assert sources.open_stored(str(tar), reindex=True).fingerprint() != first.fingerprint()
    folder = record_stores.write_folder(tmp_path / "folder", 3)
    sources.open_stored(str(folder))
    (folder / "0001.txt").write_text("another caption")
    with pytest.raises(ValueError, match="has changed since it was indexed"):
        sources.open_stored(str(folder))
    tar.with_name(f"{tar.name}.index").write_bytes(b"half an index")
    assert len(sources.open_stored(str(tar))) == 4


def test_sources_that_are_none_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "urls").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"url": ["http://a"]}), tmp_path / "urls" / "part-0.parquet")
    (tmp_path / "a.tar.gz").touch()
    (tmp_path / "empty").mkdir()
    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=2)}
    )
    example = {"image": record_stores.encoded(record_stores.picture(0)), "label": 1}
    mute = record_stores.write_prepared(tmp_path / "mute", "mute", features, [example])
    cases = {
        str(tmp_path / "urls"): "holds addresses, not pictures: img2dataset",
        str(tmp_path / "a.tar.gz"): "is compressed",
        str(tmp_path / "b.tar"): "does not exist",
        str(tmp_path / "empty"): "lists no image",
        str(mute): "has no captions: its features are image, label",
        str(mute) + "@test": "has no split 'test': it has train",
        "coco_captions": r"not prepared below .*needs TensorFlow: pip install 'if_jax\[tf\]'",
        str(tmp_path / "gone"): "does not exist: give a folder",
    }
    for source, words in cases.items():
        with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
            sources.open_stored(source)
        assert "\n" not in str(caught.value)
