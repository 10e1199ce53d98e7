"""Sources in a bucket on localhost: the batches of a disk, whatever the bucket does, and one line for each error."""

from __future__ import annotations

import errno
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bucket
import diskcache
import numpy as np
import pytest
import reading
import record_stores
import remote_sources

from if_jax.data import cache, embeddings, pipeline, remote, samples, sources
from if_jax.data.index import Filter
from if_jax.data.preprocessing import Preparation
from if_jax.data.remote import RemoteSettings

COUNT = 12
WRITE = {
    "tars": lambda path: record_stores.write_tars(path, COUNT, 5),
    "folder": lambda path: record_stores.write_folder(path, COUNT),
    "prepared": lambda path: record_stores.write_prepared(path, "coco", *record_stores.coco_like(COUNT)),
}


@pytest.fixture
def far(tmp_path: Path) -> Iterator[bucket.Bucket]:
    with remote_sources.served(tmp_path) as server:
        yield server
        assert not server.refused


def _same_batches(first: list[reading.Batch], second: list[reading.Batch]) -> None:
    for ours, theirs in zip(first, second, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])


@pytest.mark.parametrize("kind", WRITE)
def test_a_bucket_gives_the_batches_of_a_disk(kind: str, tmp_path: Path, far: bucket.Bucket) -> None:
    folder = WRITE[kind](tmp_path / "data")
    address = remote_sources.upload(far, folder, "my/data")
    near, there = sources.open_stored(str(folder)), sources.open_stored(address)
    assert there.fingerprint() == near.fingerprint() and len(there) == COUNT
    assert [there.key(i) for i in range(COUNT)] == [near.key(i) for i in range(COUNT)]
    _same_batches(reading.batches(address, 3), reading.batches(str(folder), 3))
    assert any(name.startswith("my/data/") and "index" in name for name in far.objects)
    remote_sources.forget()
    far.requests.clear()
    _same_batches(reading.batches(address, 3), reading.batches(str(folder), 3))  # what was read lies in the cache
    assert not [request for request in far.requests if request.endswith((".tar", ".png"))]


def test_patterns_of_a_bucket_are_those_of_a_disk(tmp_path: Path, far: bucket.Bucket) -> None:
    address = remote_sources.upload(far, record_stores.write_tars(tmp_path / "tars", COUNT, 2), "tars")
    sources.open_stored(address)
    for pattern, count in {
        "*.tar": 12,
        "{00001..00002}.tar": 4,
        "0000[0-3].tar": 8,
        f"00000.tar::{address}/00005.tar": 4,
        "../**/0000?.tar": 12,
    }.items():
        assert len(sources.open_stored(f"{address}/{pattern}".replace("/tars/..", ""))) == count, pattern
    far.requests.clear()
    sources.open_stored(f"{address}/{{00000..00005}}.tar")
    assert len(far.requests) == 3 * 2 + 1  # the name as it is, one listing; the indexes lie in the cache
    mixture = pipeline.open_source(f"0.5*{address} + 0.5*scenes", 8, 0, Preparation(), Filter())
    assert len(mixture.read(range(4))) == 4


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_the_same_code_reads_any_address(scheme: str, tmp_path: Path, far: bucket.Bucket) -> None:
    import fsspec

    folder = record_stores.write_tars(tmp_path / "tars", COUNT, 5)
    fsspec.filesystem("memory").put(str(folder), "/somewhere/tars", recursive=True)
    address = {"memory": "memory://somewhere/tars", "file": f"file://{folder}"}[scheme]
    _same_batches(reading.batches(address, 2), reading.batches(str(folder), 2))


def test_a_bucket_in_trouble_costs_time_and_no_sample(
    tmp_path: Path, far: bucket.Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request in ten is answered 503 or 429, and one by silence."""
    monkeypatch.setattr(remote, "SILENCE", 0.5)
    remote_sources.forget()
    folder = record_stores.write_tars(tmp_path / "tars", 40, 20)
    address = remote_sources.upload(far, folder, "tars")
    calls = itertools.count()
    statuses = itertools.cycle((503, 429, 1.5, 500))
    far.trouble = lambda request: next(statuses) if next(calls) % 10 == 3 else None
    opened = sources.open_stored(address)
    assert len(opened) == 40 and not opened.left_out
    no_cache = pipeline.open_source(address, 8, 5, Preparation(), Filter(), RemoteSettings(cache_size="0B"))
    _same_batches(reading.batches(no_cache, 5), reading.batches(str(folder), 5))
    assert next(calls) > 50


def test_a_bucket_that_stays_in_trouble_is_one_line(tmp_path: Path, far: bucket.Bucket) -> None:
    address = remote_sources.upload(far, record_stores.write_tars(tmp_path / "tars", 2, 2), "tars")
    far.trouble = lambda request: 503 if "00000.tar" in request else None
    with pytest.raises(OSError, match=r"status 503, also at try 4: check the network and the bucket.*00000\.tar") as e:
        sources.open_stored(address)
    assert e.value.errno == errno.EIO and "\n" not in str(e.value)
    assert not any(name.endswith(".index") for name in far.objects)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (403, r"may not read it \(403\): give it the role Storage Object Viewer .* gs://bucket --member"),
        (401, r"nobody is logged in here, or the login has expired \(401\): `gcloud auth application-default login`"),
        (418, "cannot be read: in trouble"),
    ],
)
def test_what_stays_is_one_line_with_its_remedy(status: int, words: str, tmp_path: Path, far: bucket.Bucket) -> None:
    address = remote_sources.upload(far, record_stores.write_tars(tmp_path / "tars", 2, 2), "tars")
    far.trouble = lambda request: status
    with pytest.raises(ValueError, match=rf"gs://bucket/tars.*{words}") as caught:
        sources.open_stored(address)
    assert "\n" not in str(caught.value)


def test_what_is_not_there_is_one_line(tmp_path: Path, far: bucket.Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    far.put("tars/empty.tar", b"")
    for source, words in {
        "gs://nobodys/tars": "data source 'gs://nobodys/tars' does not exist: check the bucket's name",
        "gs://bucket/nothing": "does not exist: check the bucket's name, and what lies in it",
        "gs://bucket/tars/*.zip": "nothing matches",
        "gs://bucket/tars": "no usable picture",
        "gs://bucket/tars@test": "only prepared data sets have splits",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            sources.open_stored(source)
    monkeypatch.setitem(sys.modules, "gcsfs.core", None)
    remote_sources.forget()
    with pytest.raises(ValueError, match=r"gs:// needs gcsfs, which is not installed: pip install 'if_jax\[data\]'"):
        sources.open_stored("gs://bucket/tars")


@pytest.mark.parametrize("kind", ["prepared", "states"])
@pytest.mark.parametrize(("status", "words"), [(401, "nobody is logged in here"), (403, "account may not read it")])
def test_array_record_never_asks_a_bucket_by_itself(
    kind: str, status: int, words: str, tmp_path: Path, far: bucket.Bucket
) -> None:
    """Its own reader hangs without a word where nobody is logged in."""
    address = remote_sources.upload(far, WRITE["prepared"](tmp_path / "data"), "data")
    if kind == "prepared":
        sources.open_stored(address)  # an index is there
        stored = sources.open_stored(address, settings=RemoteSettings(str(tmp_path / "empty")))
        far.trouble = lambda request: status
        with pytest.raises(ValueError, match=words):
            stored[0]
        read = lambda: sources.open_stored(address)  # noqa: E731
    else:
        far.trouble = lambda request: status
        read = lambda: embeddings.Embeddings("gs://bucket/states")  # noqa: E731
    with pytest.raises(ValueError, match=rf"gs://bucket/(data|states).*{words}"):
        read()


def test_a_prefix_with_nothing_in_it_is_one_line(far: bucket.Bucket) -> None:
    far.put("nothing/", b"")  # as consoles make a folder
    with pytest.raises((ValueError, FileNotFoundError), match="gs://bucket/nothing") as caught:
        sources.open_stored("gs://bucket/nothing")
    assert "\n" not in str(caught.value)


def test_a_bucket_whose_reader_pays_is_told_the_project(tmp_path: Path, far: bucket.Bucket) -> None:
    folder = WRITE["tars"](tmp_path / "tars")
    address = remote_sources.upload(far, folder, "tars")
    far.billed = "my-project"
    with pytest.raises(ValueError, match=r"the bucket's reader pays: name the project .*remote\.requester_pays="):
        sources.open_stored(address)
    settings = RemoteSettings(requester_pays="my-project")
    _same_batches(reading.batches(address, 1, settings=settings), reading.batches(str(folder), 1))


def test_an_object_that_is_written_while_it_is_fetched_is_not_kept(
    tmp_path: Path, far: bucket.Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("if_jax.data.reading._CHUNK", 100)
    address = remote_sources.upload(far, WRITE["prepared"](tmp_path / "data"), "data")
    (shard,) = (name for name in far.objects if "array_record" in name)
    asked = itertools.count()

    def write_again(request: str) -> None:
        if "/download/" in request and "array_record" in request and next(asked) == 5:
            far.put(shard, far.objects[shard][0][::-1])

    far.trouble = write_again
    with pytest.raises(
        ValueError, match=r"00000-of-00001 was written again while it was read: wait until that is done"
    ):
        sources.open_stored(address)
    assert not list((tmp_path / "cache").rglob("*.val"))


@pytest.mark.parametrize("change", ["other pixels", "cut off", "gone"])
def test_an_object_that_changes_while_it_is_read_is_named(change: str, tmp_path: Path, far: bucket.Bucket) -> None:
    address = remote_sources.upload(far, record_stores.write_tars(tmp_path / "tars", 4, 2), "tars")
    source = samples.StoredPictures(sources.open_stored(address), 8, 0, Preparation())
    content, _ = far.objects["tars/00001.tar"]
    if change == "gone":
        del far.objects["tars/00001.tar"]
    else:
        changed = content.replace(b"number 3", b"number 4") if change == "other pixels" else content[:1000]
        far.put("tars/00001.tar", changed)
    words = {
        "other pixels": "000010003 is not what was indexed: the object was written again",
        "cut off": r"00001.tar: sample 00001000\d cannot be read any more",
        "gone": "00001.tar does not exist",
    }[change]
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        source.read(range(4))
    if change != "gone":  # another run, from the start
        with pytest.raises(ValueError, match="has changed since it was indexed"):
            sources.open_stored(address)


def test_parts_of_many_objects_come_by_one_call(
    tmp_path: Path, far: bucket.Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a request of its own gives, and nothing for the one that failed."""
    folder = record_stores.write_tars(tmp_path / "tars", 30, 10)
    address = remote_sources.upload(far, folder, "tars")
    ranges = [(512, 700), (0, 0), (5_000, 200), (90_000, 10)]
    paths = [remote.RemotePath(f"{address}/{name}.tar") for name in ("00000", "00001", "00002")]
    wanted = [(path, ranges[:3]) for path in paths]
    assert remote.read_many(wanted) == [path.read_ranges(ranges[:3]) for path in paths]
    assert remote.read_many([*wanted, (paths[0], ranges)])[3] is None  # it ends before
    assert remote.read_many([(paths[0] / "none", ranges[:1]), wanted[0]])[0] is None
    assert remote.read_many([]) == []

    calls = []
    stored = sources.open_stored(address)
    monkeypatch.setattr(sources, "read_many", lambda parts: calls.append(len(parts)) or remote.read_many(parts))
    monkeypatch.setattr(remote.RemotePath, "read_range", lambda *_: pytest.fail("a request by itself"))
    settings = RemoteSettings(cache_size="0B")
    source = pipeline.open_source(address, 8, 5, Preparation(), Filter(), settings)
    _same_batches(reading.batches(source, 3), reading.batches(str(folder), 3))
    assert calls[:3] == [8, 8, 8] and len(stored) == 30


def test_the_cache_is_bounded_and_the_oldest_goes_first(tmp_path: Path, far: bucket.Bucket) -> None:
    settings = RemoteSettings(str(tmp_path / "kept"), "1MB")
    for number in range(40):
        cache.put(settings, str(number), bytes(100_000))
    kept = [number for number in range(40) if cache.get(settings, str(number)) is not None]
    assert kept == list(range(kept[0], 40)) and 5 <= len(kept) <= 11
    assert sum(path.stat().st_size for path in (tmp_path / "kept").rglob("*.val")) <= 1_100_000
    address = remote_sources.upload(far, WRITE["prepared"](tmp_path / "data"), "data")
    for size, words in (("0B", "is read as a whole file: give"), ("40kB", "does not fit in the cache .*40kB")):
        with pytest.raises(ValueError, match=words):
            sources.open_stored(address, settings=RemoteSettings(str(tmp_path / size), size))


def test_nothing_that_others_have_pickled_is_loaded(tmp_path: Path) -> None:
    with diskcache.Cache(str(tmp_path)) as foreign:
        foreign.set("key", ["an object"])
    assert cache.get(RemoteSettings(cache_folder=str(tmp_path)), "key") is None


def test_a_full_or_damaged_disk_never_ends_a_run(
    tmp_path: Path, far: bucket.Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = record_stores.write_tars(tmp_path / "tars", 4, 4)
    address = remote_sources.upload(far, folder, "tars")
    wanted = reading.batches(str(folder), 1, batch_size=4)

    def full(self: Any, path: str, *args: Any) -> int:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(diskcache.Disk, "_write", full)
        patch.setattr(diskcache.Disk, "store", _large(diskcache.Disk.store))
        _same_batches(reading.batches(address, 1, batch_size=4), wanted)
    assert not list((tmp_path / "cache").rglob("*.val"))
    _same_batches(reading.batches(address, 1, batch_size=4), wanted)
    (database,) = (tmp_path / "cache").rglob("cache.db")
    stored = diskcache.Cache(str(database.parent))
    for key in list(stored):
        stored[key] = stored[key][:50]
    _same_batches(reading.batches(address, 1, batch_size=4), wanted)
    remote_sources.forget()
    for file in database.parent.iterdir():
        if file.is_file():
            file.write_bytes(b"no database at all")
    _same_batches(reading.batches(address, 1, batch_size=4), wanted)


def _large(real: Any) -> Any:
    """diskcache's `store` that keeps nothing within its database."""

    def store(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.min_file_size = 0
        return real(self, *args, **kwargs)

    return store
