"""Stored records of any kind behind one interface: number → picture, caption, metadata, the same for every reader.

What a source may be: a data set built here or prepared by TensorFlow Datasets (its folder or name, `@split` behind it),
tar files of img2dataset or webdataset (a folder, a file, or a pattern), a folder of pictures with captions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from if_jax.data.folder import Folder
from if_jax.data.index import Filter, Index, Record, RecordStore, build_index, load_index, save_index
from if_jax.data.preprocessing import UnusableRecord
from if_jax.data.tars import find_tars
from if_jax.data.tfds_folder import TfdsFolder, find_tfds_folder

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

    def __getitem__(self, number: int) -> Record:
        """Record `number`; ValueError where it cannot be read any more."""
        store, row = self.rows[number]
        index = self.indexes[store]
        key = index.key(row)
        try:
            return self.stores[store].read(key, index.places[row])
        except UnusableRecord as flaw:
            raise ValueError(f"{self.name}: record {key} cannot be read any more ({flaw})") from None

    def key(self, number: int) -> str:
        """The record's name, unique within the source."""
        store, row = self.rows[number]
        own = self.indexes[store].key(row)
        return f"{Path(self.stores[store].name).stem}/{own}" if len(self.stores) > 1 else own

    def facts(self, field: str) -> np.ndarray:
        """(N,) of an index column: width, height, caption (characters), clip, aesthetic, watermark."""
        parts = [index.facts[field][self.rows[self.rows[:, 0] == i, 1]] for i, index in enumerate(self.indexes)]
        return np.concatenate(parts)

    def fingerprint(self) -> str:
        """A hash of which records there are, in order, and of the bytes behind them."""
        known = hashlib.sha256(repr([index.fingerprint for index in self.indexes]).encode())
        known.update(self.rows.tobytes())
        return known.hexdigest()


def open_stored(
    source: str, keep: Filter | None = None, *, workers: int | None = None, reindex: bool = False
) -> Stored:
    """Open a source, indexing what was not indexed before; progress is kept store by store.

    Args:
      source: as the module says.
      keep: which records are used; all usable ones unless given.
      workers: processes that index tars side by side; None: one per core.
      reindex: index again what has changed since it was indexed, rather than refuse it.

    Raises:
      FileNotFoundError, ValueError: one line that says what is wrong with the source; no record passes the filter.
    """
    stores = find_record_stores(source)
    stored = _select(source, stores, _indexes(stores, workers, reindex), keep or Filter())
    if not len(stored):
        raise ValueError(
            f"no usable picture in {source!r}: {'; '.join(summarise_skipped(stored.left_out)) or 'it is empty'}"
        )
    return stored


def find_record_stores(source: str) -> tuple[RecordStore, ...]:
    """The files or folders a source is made of, not yet indexed.

    Raises:
      FileNotFoundError, ValueError: one line that says what is wrong with the source.
    """
    source = str(source)
    base, at, split = source.rpartition("@")
    if not at or Path(source).exists():
        base, split = source, "train"
    path = Path(base)
    if path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet")) and not any(path.glob("*.tar"))):
        raise ValueError(f"{source!r} holds addresses, not pictures: img2dataset fetches them into tar files")
    if folder := find_tfds_folder(base):
        return (TfdsFolder(folder, split),)
    if at and split != "train":
        raise ValueError(f"{source!r}: only prepared data sets have splits (@{split})")
    if ".tar" in path.name or (path.is_dir() and any(path.glob("*.tar*"))):
        return tuple(find_tars(base))
    if not path.is_dir():
        raise FileNotFoundError(
            f"data source {source!r} does not exist: give a folder, tar files, a prepared data set, or build one with "
            "`if-jax data build`"
        )
    return (Folder(path),)


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
    loaded = [load_index(store, reindex=reindex) for store in stores]
    missing = [store for store, index in zip(stores, loaded, strict=True) if index is None]
    began = time.monotonic()
    first = [_index(store) for store in missing[:1]]
    left = (time.monotonic() - began) * (len(missing) - 1)
    workers = 1 if left < _WORTH_PROCESSES else cores() if workers is None else workers
    made = iter([*first, *in_processes(_index, missing[1:], workers, "indexing")])
    return tuple(index if index is not None else next(made) for index in loaded)


def _index(store: RecordStore) -> Index:
    index = build_index(store)
    save_index(store, index)
    return index


def _select(source: str, stores: tuple[RecordStore, ...], indexes: tuple[Index, ...], keep: Filter) -> Stored:
    rows, left_out = [], {}
    for number, (store, index) in enumerate(zip(stores, indexes, strict=True)):
        used, dropped = index.select(keep)
        rows.append(np.stack([np.full(len(used), number, np.int64), used], axis=1))
        before = f"{Path(store.name).name}: " if len(stores) > 1 else ""
        for reason, which in dropped.items():
            left_out.setdefault(reason, []).extend(before + index.key(row) for row in which)
    return Stored(source, stores, indexes, np.concatenate(rows), left_out)
