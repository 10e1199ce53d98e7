"""Data in a bucket as this host will read it: whether it may, how fast, and from which region."""

from __future__ import annotations

import os
import re
import tarfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np

from if_jax.config import Recipe
from if_jax.data import pipeline
from if_jax.data.discovery import find_record_stores
from if_jax.data.index import RecordStore
from if_jax.data.reading import in_flight
from if_jax.data.remote import RemotePath, open_filesystem
from if_jax.data.tars import Tar
from if_jax.doctor.findings import Finding, attempt

_SECONDS, _LARGEST = 5.0, 2**29  # of a sample: it ends with either
_HEAD = 2**22  # bytes of a tar that say how large its pictures are
_RECORD = 2**17  # bytes of a read where a record's size is not known
_SLOW = 1.0  # seconds a batch may take before it is worth a warning
_METADATA_HOST = "169.254.169.254"  # of every machine of Google Cloud
# Locations of buckets that are more than a region; https://cloud.google.com/storage/docs/locations
_WIDE = {"us": ("us-",), "eu": ("europe-",), "asia": ("asia-",)}
_DUAL = {
    "nam4": ("us-central1", "us-east1"),
    "eur4": ("europe-north1", "europe-west4"),
    "asia1": ("asia-northeast1", "asia-northeast2"),
}


class DataSample(NamedTuple):
    """What reading a source for some seconds has shown."""

    rate: float  # bytes a second
    size: int  # bytes of the whole source
    record: float  # bytes of a picture with its caption, about; 0: not known


def remote_data(recipe: Recipe, hosts: int) -> Iterator[Finding]:
    """The findings about each part of `data.source` that lies in a bucket, none where all is here.

    Args:
      recipe: what is to be trained.
      hosts: that read it, each its part of every batch.
    """
    for name in pipeline.stored_parts(recipe.data.source):
        if "://" not in name:
            continue

        def read(name: str = name) -> tuple[str, DataSample]:
            sample = _sample(find_record_stores(name, recipe.data.remote))
            return "", sample

        finding, sample = attempt("data speed", "run `if-jax data inspect` on it", read)
        if sample is None:
            yield finding
            continue
        yield _speed(name, sample, recipe.batch_size / hosts)
        if name.startswith(("gs://", "gcs://")):
            yield _region(name, sample, recipe.data.remote.requester_pays)


def compare_regions(region: str, location: str, parts: Sequence[str] = ()) -> bool | None:
    """Whether a region is one that a bucket lies in; None where that cannot be known.

    Args:
      region: of this machine, such as "us-east5".
      location: of the bucket, such as "US-EAST5", "US" or "NAM4".
      parts: the regions of a bucket that lies in two of its owner's choice.
    """
    region, location = region.lower(), location.lower()
    regions = [part.lower() for part in parts] or _DUAL.get(location, ())
    if regions:
        return region in regions
    if location in _WIDE:
        return region.startswith(_WIDE[location])
    return region == location if re.fullmatch(r"[a-z]+-[a-z]+\d+", location) else None


def _sample(stores: Sequence[RecordStore]) -> DataSample:
    """Reads records' worth of bytes at places by chance, many at a time, as training does."""
    files = [file for store in stores for file in _files(store)]
    size = sum(length for _, length in files)
    if not size:
        raise ValueError("nothing is in it: name another data.source")
    record = _record_bytes(stores[0], files[0])
    rng, shares = np.random.default_rng(), np.array([length for _, length in files]) / size
    reads = int(record or _RECORD)

    def places() -> Iterator[tuple[RemotePath, int]]:
        while True:
            path, length = files[rng.choice(len(files), p=shares)]
            yield path, int(rng.integers(max(1, length - reads)))

    began, got = time.perf_counter(), 0
    for content in in_flight(lambda place: place[0].read_range(place[1], reads), places(), True):
        got += len(content)
        if time.perf_counter() - began > _SECONDS or got > min(_LARGEST, 4 * size):
            break
    return DataSample(got / (time.perf_counter() - began), size, record)


def _files(store: RecordStore) -> list[tuple[RemotePath, int]]:
    if not isinstance(store.path, RemotePath):
        return []
    whole = store.path.name  # of a store that is one file
    files = [(name, size) for name, size in store.files() if size > 0 and ": " not in name]  # a picture's caption
    return [(store.path if name == whole else store.path / name, size) for name, size in files]


def _record_bytes(store: RecordStore, file: tuple[RemotePath, int]) -> float:
    """Bytes of a tar by its pictures, from the first of them; 0 where there is no telling."""
    if not isinstance(store, Tar):
        return 0.0
    path, size = file
    keys: set[str] = set()
    end = 0
    try:
        with tarfile.open(fileobj=BytesIO(path.read_range(0, min(size, _HEAD))), mode="r:") as tar:
            for member in tar:
                keys.add(member.name.partition(".")[0])
                end = member.offset_data + member.size
    except tarfile.TarError:  # the rest is not there
        pass
    return end / len(keys) if keys else 0.0


def _speed(name: str, sample: DataSample, rows: float) -> Finding:
    rate = f"{name}: {_megabytes(sample.rate)} MB/s on this host"
    if not sample.record:
        return Finding("data speed", "pass", rate)
    need = rows * sample.record
    message = f"{rate}; its part of a batch is {_megabytes(need)} MB, which comes every {need / sample.rate:.2g} s"
    if need / sample.rate > _SLOW:
        remedy = "a shorter step waits for it: use a bucket in the region of this machine, or more hosts"
        return Finding("data speed", "warn", message, remedy)
    return Finding("data speed", "pass", message)


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f}" if size >= 1e7 else f"{size / 1e6:.2g}"


def _region(name: str, sample: DataSample, requester_pays: str) -> Finding:
    bucket = name.partition("://")[2].partition("/")[0]
    zone = _own_zone()
    if not zone:
        message = f"this machine is none of Google Cloud: reading gs://{bucket} is traffic out of it, which is billed"
        return Finding("data region", "pass", message)
    region = zone.rpartition("-")[0]
    try:
        details: dict[str, Any] = open_filesystem("gs", requester_pays).call("GET", f"b/{bucket}", json_out=True)
    except Exception:  # as different as the errors of libraries are
        message = f"this account may not see where gs://{bucket} lies (this machine: {region})"
        remedy = f"compare: gcloud storage buckets describe gs://{bucket} --format='value(location)'"
        return Finding("data region", "warn", message, remedy)
    location = details.get("location", "")
    parts = details.get("customPlacementConfig", {}).get("dataLocations", ())
    same = compare_regions(region, location, parts)
    where = f"gs://{bucket} is in {' + '.join(parts) or location}, this machine in {region}"
    if same:
        wide = location.lower() in _WIDE
        note = ": a bucket of several regions, reading from which may be billed" if wide else ""
        return Finding("data region", "pass", where + note)
    cost = f"every pass over it is {_megabytes(sample.size)} MB of traffic between regions, which is slower, and billed"
    remedy = f"copy it to a bucket in {region}, or take the slice there (prices: cloud.google.com/storage/pricing)"
    return Finding("data region", "warn", f"{where}: {cost}", remedy)


def _own_zone() -> str:
    """The zone of this machine, as Google Cloud's metadata server tells it; "" elsewhere."""
    host = os.environ.get("GCE_METADATA_HOST", _METADATA_HOST)
    asked = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/zone", headers={"Metadata-Flavor": "Google"}
    )
    try:
        with urllib.request.urlopen(asked, timeout=1.0) as answer:
            return answer.read().decode().rpartition("/")[2].strip()
    except (OSError, ValueError):
        return ""
