"""A bucket that falls silent, and one that speaks S3: the batches of a disk."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import bucket
import numpy as np
import pytest
import reading
import record_stores
import remote_sources
from test_embed_processes import _free_place

from if_jax.data import embedding_shards, embeddings, pipeline, remote, sources
from if_jax.data.index import Filter
from if_jax.data.preprocessing import Preparation
from if_jax.data.remote import RemoteSettings

NO_CACHE = RemoteSettings(cache_size="0B")


def _compare(tmp_path: Path, far: bucket.Bucket, seconds: float) -> float:
    """Compares batches of a bucket that falls silent with those of a disk; the seconds they took."""
    folder = record_stores.write_tars(tmp_path / "tars", 40, 20)
    address = remote_sources.upload(far, folder, "tars")
    opened = pipeline.open_source(address, 8, 5, Preparation(), Filter(), NO_CACHE)
    far.trouble = remote_sources.silent(seconds, 10)
    began = time.monotonic()
    batches = reading.batches(opened, 5, threads=2)
    for ours, theirs in zip(batches, reading.batches(str(folder), 5), strict=True):
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name])
    return time.monotonic() - began


def test_silence_shorter_than_the_patience_is_waited_for(tmp_path: Path) -> None:
    with remote_sources.served(tmp_path) as far:
        assert _compare(tmp_path, far, 1.0) > 1.0


def test_silence_longer_than_the_patience_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "SILENCE", 0.3)
    with remote_sources.served(tmp_path) as far:
        assert _compare(tmp_path, far, 1.0) > 1.0
        assert len(far.requests) > 60  # 40 records, and the same ones again


@pytest.mark.slow
@pytest.mark.parametrize("patience", [60.0, 10.0])
def test_thirty_seconds_of_silence(patience: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "SILENCE", patience)
    pauses = remote.PAUSES
    with remote_sources.served(tmp_path) as far:
        monkeypatch.setattr(remote, "PAUSES", pauses)
        assert _compare(tmp_path, far, 30.0) > 30.0


@contextmanager
def _moto(tmp_path: Path) -> Iterator[str]:
    """A server of S3 on localhost, as `moto` plays it; its address."""
    port = _free_place().rpartition(":")[2]
    log = (tmp_path / "moto.log").open("w")
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-p", port]
    with subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as server:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.kill()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_sources_and_text_states_in_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tars by ranges; array_record files, of a data set and of text states, whole through the cache."""
    s3fs = pytest.importorskip("s3fs", reason="needs s3fs and moto[server]")
    pytest.importorskip("moto.server", reason="needs s3fs and moto[server]")
    monkeypatch.setattr(embedding_shards, "PER_SHARD", 5)
    with _moto(tmp_path) as address:
        for name, value in {
            **{"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "one", "AWS_SECRET_ACCESS_KEY": "two"},
            **{"AWS_DEFAULT_REGION": "us-east-1", "XDG_CACHE_HOME": str(tmp_path / "cache")},
        }.items():
            monkeypatch.setenv(name, value)
        remote_sources.forget()
        files = s3fs.S3FileSystem(endpoint_url=address)
        _until(lambda: files.mkdir("shards"))
        tars = record_stores.write_tars(tmp_path / "tars", 12, 5)
        built = record_stores.write_prepared(tmp_path / "built", "coco", *record_stores.coco_like(12))
        for folder in (tars, built):
            files.put(str(folder), f"shards/{folder.name}", recursive=True)
            far = f"s3://shards/{folder.name}"
            for ours, theirs in zip(reading.batches(far, 3), reading.batches(str(folder), 3), strict=True):
                for name in theirs:
                    np.testing.assert_array_equal(ours[name], theirs[name])
        assert [path.suffix for path in (tmp_path / "cache").rglob("*.val")]  # the array_record file
        stored = sources.open_stored(far)
        shape = {"form": "exact", "encoder": "b", "length": 77, "width": 4, "batch_size": 8}
        spec = embedding_shards.make_spec(stored, Preparation(), **shape)
        target = embedding_shards.CacheFolder(remote.RemotePath("s3://shards/states"), spec)
        target.begin()

        def encode(some: list[str]) -> tuple[np.ndarray, np.ndarray]:
            states = np.stack([np.full((77, 4), len(caption)) for caption in some])
            return states.astype(embeddings.BFLOAT16), np.ones(len(some), int)

        for shard in target.open_shards():
            target.write(
                shard,
                lambda shard=shard: embedding_shards.shard_records(stored, shard, spec, encode, lambda count: None),
            )
        target.close()
        cache = embeddings.Embeddings("s3://shards/states")
        assert cache.captions == 36 and cache.states(11, 2, "caption 2 of 11")[0, 0] == len("caption 2 of 11")
        cache.verify()
        for missing in ("s3://shards/nothing", "s3://nobodys/tars"):
            with pytest.raises(FileNotFoundError, match="does not exist"):
                sources.open_stored(missing)
    remote_sources.forget()


def _until(act: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            act()
            return
        except Exception:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)
