"""Stored records of any kind behind one interface: number → picture, caption, metadata, the same for every reader.

What a source may be: a data set built here or prepared by TensorFlow Datasets (its folder or name, `@split` behind it),
tar files of img2dataset or webdataset (a folder, files, or a pattern), tables with pictures inside (Parquet, Arrow), a
folder of pictures with captions.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from if_jax.data.cached_records import read_cached
from if_jax.data.discovery import discover
from if_jax.data.exclusions import Exclusions, read_exclusions
from if_jax.data.index import Filter, Index, Record, RecordStore, index_store, load_index
from if_jax.data.preprocessing import UnusableRecord, read_picture
from if_jax.data.reading import in_flight
from if_jax.data.remote import RemotePath, RemoteSettings, forget_listings
from if_jax.data.tars import Tar

_WORTH_PROCESSES = 10.0  # seconds of work; starting processes takes a few


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """The records of a source that pass a filter, numbered from 0 in an order that never changes."""

    name: str
    stores: tuple[RecordStore, ...]
    indexes: tuple[Index, ...]
    rows: np.ndarray  # (N, 2) int64: store, row
    left_out: dict[str, list[str]]  # reason -> keys of what is not used

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def remote(self) -> bool:
        """Whether the records lie in a bucket, from where many are best read at a time."""
        return any(isinstance(store.path, RemotePath) for store in self.stores)

    def __getitem__(self, number: int) -> Record:
        """Record `number`; ValueError where it cannot be read any more, or an object is not what was indexed."""
        at, row = self.rows[number]
        index, store = self.indexes[at], self.stores[at]
        key, place = index.key(row), index.places[row]
        try:
            if isinstance(store.path, RemotePath):
                return read_cached(store, store.path.settings, key, place, int(index.facts["content"][row]))
            return store.read(key, place)
        except UnusableRecord as flaw:
            raise ValueError(f"{self.name}: record {key} cannot be read any more ({flaw})") from None

    def captions(self, number: int) -> tuple[str, ...]:
        """Captions of record `number`, of tars without its picture; ValueError where they cannot be read any more.

        They are not held against the index: whoever keeps what comes of them compares when it is used.
        """
        at, row = self.rows[number]
        store = self.stores[at]
        if isinstance(store, Tar):
            return store.captions(self.indexes[at].key(row), self.indexes[at].places[row])
        return self[number].captions

    def decode(self, number: int) -> tuple[Record, Image.Image]:
        """Record `number` and its picture; ValueError naming it where it cannot be read or decoded any more."""
        record = self[number]
        try:
            return record, read_picture(record.picture)
        except UnusableRecord as flaw:
            raise ValueError(
                f"{self.name}: record {self.key(number)} could be decoded when it was indexed and no longer can "
                f"({flaw}): put it back, or index again for a new run"
            ) from None

    def key(self, number: int) -> str:
        """The record's name, unique within the source."""
        store, row = self.rows[number]
        own = self.indexes[store].key(row)
        return f"{_labels(self.stores)[store]}/{own}" if len(self.stores) > 1 else own

    def facts(self, field: str) -> np.ndarray:
        """(N,) of an index column: width, height, caption (characters), clip, aesthetic, watermark, content."""
        parts = [index.facts[field][self.rows[self.rows[:, 0] == i, 1]] for i, index in enumerate(self.indexes)]
        return np.concatenate(parts)

    def fingerprint(self) -> str:
        """A hash of the records' pictures and captions in order, wherever they are stored."""
        content = np.concatenate([np.zeros(0, np.uint64), self.facts("content")])
        return hashlib.sha256(content.astype("<u8").tobytes()).hexdigest()


def open_stored(
    source: str,
    keep: Filter | None = None,
    *,
    workers: int | None = None,
    reindex: bool = False,
    exclude: str = "",
    settings: RemoteSettings = RemoteSettings(),  # noqa: B008 (frozen)
) -> Stored:
    """Open a source, indexing what was not indexed before; progress is kept store by store.

    Args:
      source: as the module says.
      keep: which records are used; all usable ones unless given.
      workers: processes that index tars side by side; None: one per core.
      reindex: index again what has changed since it was indexed, rather than refuse it.
      exclude: a file that lists records which are not used, see `exclusions`.
      settings: of buckets.

    Raises:
      FileNotFoundError, ValueError: one line that says what is wrong with the source; no record passes the filter.
    """
    excluded = read_exclusions(exclude, settings)
    stores, unread = discover(source, settings)
    stored = _select(source, stores, _indexes(stores, workers, reindex), keep or Filter(), excluded, unread)
    forget_listings()
    if not len(stored):
        raise ValueError(
            f"no usable picture in {source!r}: {'; '.join(summarise_skipped(stored.left_out)) or 'it is empty'}"
        )
    return stored


def summarise_skipped(left_out: dict[str, list[str]]) -> list[str]:
    """One line per reason: how many, and the first few by name."""
    lines = []
    for reason, keys in sorted(left_out.items()):
        named = ", ".join(keys[:3]) + (", …" if len(keys) > 3 else "")
        lines.append(f"skipped {len(keys)}: {reason} ({named})")
    return lines


def in_processes(task: Callable[[Any], Any], arguments: list[Any], workers: int, what: str) -> Iterable[Any]:
    """Run a task on many arguments with a progress bar.

    Args:
      task: a function that pickles.
      arguments: one for each run.
      workers: fresh processes; below 2 this one does it.
      what: the bar's name.

    Yields:
      The results in order.
    """
    bar = tqdm(total=len(arguments), desc=what, disable=len(arguments) < 2)
    with bar:
        if workers < 2 or len(arguments) < 2:
            for argument in arguments:
                yield task(argument)
                bar.update()
            return
        spawn = multiprocessing.get_context("spawn")  # a forked JAX would hang
        with ProcessPoolExecutor(min(workers, len(arguments)), mp_context=spawn) as pool:
            for result in pool.map(task, arguments):
                yield result
                bar.update()


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _indexes(stores: tuple[RecordStore, ...], workers: int | None, reindex: bool) -> tuple[Index, ...]:
    remote = any(isinstance(store.path, RemotePath) for store in stores)
    loaded = list(in_flight(functools.partial(load_index, reindex=reindex), stores, remote))
    missing = [store for store, index in zip(stores, loaded, strict=True) if index is None]
    began = time.monotonic()
    index = functools.partial(index_store, reindex=reindex)
    first = [index(store) for store in missing[:1]]
    left = (time.monotonic() - began) * (len(missing) - 1)
    workers = 1 if left < _WORTH_PROCESSES else cores() if workers is None else workers
    made = iter([*first, *in_processes(index, missing[1:], workers, "indexing")])
    return tuple(kept if kept is not None else next(made) for kept in loaded)


def _select(
    source: str,
    stores: tuple[RecordStore, ...],
    indexes: tuple[Index, ...],
    keep: Filter,
    exclude: Exclusions | None,
    unread: dict[str, list[str]],
) -> Stored:
    rows, left_out = [np.zeros((0, 2), np.int64)], {reason: list(names) for reason, names in unread.items()}
    labels = _labels(stores)
    for number, index in enumerate(indexes):
        used, dropped = index.select(keep, exclude, labels[number])
        rows.append(np.stack([np.full(len(used), number, np.int64), used], axis=1))
        before = f"{labels[number]}: " if len(stores) > 1 else ""
        for reason, which in dropped.items():
            left_out.setdefault(reason, []).extend(before + index.key(row) for row in which)
    return Stored(source, stores, indexes, np.concatenate(rows), left_out)


@functools.lru_cache(maxsize=4)
def _labels(stores: tuple[RecordStore, ...]) -> list[str]:
    """A short name of each store, unlike the others': its path below what all share, without suffix."""
    paths = [Path(store.name).absolute() for store in stores]
    shared = os.path.commonpath([path.parent for path in paths]) if paths else ""
    short = [path.relative_to(shared).with_suffix("").as_posix() for path in paths]
    return short if len(set(short)) == len(short) else [path.relative_to(shared).as_posix() for path in paths]
