"""Stored records of any kind behind one interface: number → picture, caption, metadata, the same for every reader.

What a source may be: a data set built here or prepared by TensorFlow Datasets (its folder or name, `@split` behind it),
tar files of img2dataset or webdataset (a folder, files, or a pattern), tables with pictures inside (Parquet, Arrow), a
folder of pictures with captions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image
from tqdm import tqdm

from if_jax.data.cached_records import keep_checked, read_cached, read_kept
from if_jax.data.discovery import discover
from if_jax.data.exclusions import Exclusions, read_exclusions
from if_jax.data.index import Filter, Index, index_folder
from if_jax.data.index_part import FACTS
from if_jax.data.indexing import index_store
from if_jax.data.parts_table import load_indexes, save_table
from if_jax.data.preprocessing import UnusableRecord, read_picture
from if_jax.data.records import Record, RecordStore
from if_jax.data.remote import RemoteError, RemotePath, RemoteSettings, forget_listings, read_many
from if_jax.data.selection import FOLDER, Selection, Skipped, left_out, select_rows
from if_jax.data.tars import Tar

_WORTH_PROCESSES = 10.0  # seconds of work; starting processes takes a few


class UncheckedFlaw(ValueError):
    """A picture that cannot be decoded, of an index that was made of pictures' heads alone."""


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """The records of a source that pass a filter, numbered from 0 in an order that never changes."""

    name: str
    stores: tuple[RecordStore, ...]
    indexes: tuple[Index, ...]
    selection: Selection
    keep: Filter
    exclude: Exclusions | None
    unread: dict[str, list[str]]  # reason -> names of what is there and no part of the source

    def __len__(self) -> int:
        return self.selection.count

    @functools.cached_property
    def remote(self) -> bool:
        """Whether the records lie in a bucket, from where many are best read at a time."""
        return any(isinstance(store.path, RemotePath) for store in self.stores)

    def __getitem__(self, number: int) -> Record:
        """Record `number`; ValueError where it cannot be read any more, or an object is not what was indexed."""
        at, row = self.place(number)
        columns, store = self.indexes[at].columns, self.stores[at]
        key, place = self.indexes[at].key(row), columns.places[row].tolist()
        try:
            if isinstance(store.path, RemotePath):
                return read_cached(store, store.path.settings, key, place, int(columns.facts["content"][row]))
            return store.read(key, place)
        except UnusableRecord as flaw:
            raise ValueError(f"{self.name}: record {key} cannot be read any more ({flaw})") from None

    def read_ahead(self, numbers: Sequence[int]) -> dict[int, Record]:
        """Those of some records that lie in tars in a bucket, read by one call for all.

        What could not be read, or is not what was indexed, is left out: `self[number]` tries again, and says what is
        wrong.
        """
        records: dict[int, Record] = {}
        if not self.remote:
            return records
        parts: dict[int, tuple[Tar, str, list[int], int]] = {}
        for number in numbers:
            at, row = self.place(number)
            columns, store = self.indexes[at].columns, self.stores[at]
            if not isinstance(store, Tar) or not isinstance(store.path, RemotePath):
                continue
            key, content = self.indexes[at].key(row), int(columns.facts["content"][row])
            kept = read_kept(store.path.settings, key, content)
            if kept is not None:
                records[number] = kept
            else:
                parts[number] = store, key, columns.places[row].tolist(), content
        wanted = [(cast(RemotePath, store.path), Tar.ranges(place)) for store, _, place, _ in parts.values()]
        for (number, (store, key, place, content)), read in zip(parts.items(), read_many(wanted), strict=True):
            record = None if read is None else Tar.record(key, place, read)
            if isinstance(record, Record):
                with contextlib.suppress(RemoteError):
                    records[number] = keep_checked(store, wanted[0][0].settings, record, content)
        return records

    def captions(self, number: int) -> tuple[str, ...]:
        """Captions of record `number`, of tars without its picture; ValueError where they cannot be read any more.

        They are not held against the index: whoever keeps what comes of them compares when it is used.
        """
        at, row = self.place(number)
        index, store = self.indexes[at], self.stores[at]
        if isinstance(store, Tar):
            return store.captions(index.key(row), index.columns.places[row].tolist())
        return self[number].captions

    def decode(self, number: int, record: Record | None = None) -> tuple[Record, Image.Image]:
        """Record `number` and its picture; ValueError naming it where it cannot be read or decoded any more.

        Args:
          number: of the record.
          record: itself, where it was read ahead.

        Raises:
          UncheckedFlaw: it never could be decoded, perhaps: the index has not tried.
        """
        record = record or self[number]
        try:
            return record, read_picture(record.picture)
        except UnusableRecord as flaw:
            if self.indexes[self.place(number)[0]].head.check == "headers":
                raise UncheckedFlaw(
                    f"{self.name}: record {self.key(number)} cannot be decoded ({flaw}), and was indexed by its head "
                    "alone: `if-jax data index --check decode` leaves all such out"
                ) from None
            raise ValueError(
                f"{self.name}: record {self.key(number)} could be decoded when it was indexed and no longer can "
                f"({flaw}): put it back, or index again for a new run"
            ) from None

    def place(self, number: int) -> tuple[int, int]:
        """Which store record `number` is in, and its row there; IndexError behind the last."""
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of {len(self)}")
        row = int(self.selection.rows[number])
        store = int(np.searchsorted(self._starts, row, "right")) - 1
        return store, row - int(self._starts[store])

    def key(self, number: int) -> str:
        """The record's name, unique within the source."""
        store, row = self.place(number)
        own = self.indexes[store].key(row)
        return f"{_labels(self.stores)[store]}/{own}" if len(self.stores) > 1 else own

    def facts(self, field: str) -> np.ndarray:
        """(N,) of an index column: width, height, caption (characters), clip, aesthetic, watermark, content."""
        rows, parts = self.selection.rows, [np.zeros(0, FACTS[field])]
        ends = np.searchsorted(rows, self._starts)
        for index, start, begin, end in zip(self.indexes, self._starts, ends, ends[1:], strict=False):
            parts.append(index.columns.facts[field][rows[begin:end] - rows.dtype.type(start)])
        return np.concatenate(parts)

    def fingerprint(self) -> str:
        """A hash of the records' pictures and captions in order, wherever they are stored."""
        return self.selection.fingerprint

    @property
    def skipped(self) -> dict[str, Skipped]:
        """How many records are not used for each reason, and the first few by name."""
        unread = {reason: Skipped.summary(names) for reason, names in self.unread.items()}
        return unread | self.selection.skipped

    @property
    def left_out(self) -> dict[str, list[str]]:
        """Every record that is not used, by reason: as long as there are such, so not for a source of millions."""
        names = {reason: list(keys) for reason, keys in self.unread.items()}
        for reason, keys in left_out(self.indexes, _labels(self.stores), self.keep, self.exclude).items():
            names.setdefault(reason, []).extend(keys)
        return names

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        """(parts + 1,) int64: the number of each part's first row, and of all rows."""
        return np.cumsum([0, *(index.head.count for index in self.indexes)])


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
    excluded, keep = read_exclusions(exclude, settings), keep or Filter()
    stores, unread = discover(source, settings)
    folders = rows_folders(stores)
    indexes = _indexes(stores, folders, workers, reindex)
    selection = select_rows(indexes, _labels(stores), keep, excluded, folders)
    forget_listings()
    stored = Stored(source, stores, indexes, selection, keep, excluded, unread)
    if not len(stored):
        raise ValueError(
            f"no usable picture in {source!r}: {'; '.join(summarise_skipped(stored.skipped)) or 'it is empty'}"
        )
    return stored


def summarise_skipped(skipped: Mapping[str, Skipped]) -> list[str]:
    """One line per reason: how many, and the first few by name."""
    lines = []
    for reason, (total, names) in sorted(skipped.items()):
        named = ", ".join(names) + (", …" if total > len(names) else "")
        lines.append(f"skipped {total}: {reason} ({named})")
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


def _indexes(
    stores: tuple[RecordStore, ...], folders: Sequence[Path], workers: int | None, reindex: bool
) -> tuple[Index, ...]:
    loaded, by_table = load_indexes(stores, folders, reindex=reindex)
    if by_table:
        return tuple(index for index in loaded if index)
    missing = [store for store, index in zip(stores, loaded, strict=True) if index is None]
    began = time.monotonic()
    index = functools.partial(index_store, reindex=reindex)
    first = [index(store) for store in missing[:1]]
    left = (time.monotonic() - began) * (len(missing) - 1)
    workers = 1 if left < _WORTH_PROCESSES else cores() if workers is None else workers
    made = iter([*first, *in_processes(index, missing[1:], workers, "indexing")])
    indexes = tuple(kept if kept is not None else next(made) for kept in loaded)
    save_table(stores, indexes, folders)
    return indexes


def rows_folders(stores: tuple[RecordStore, ...]) -> list[Path]:
    """Where the table of parts and the rows that are used may be kept: beside the data, in the user's cache folder."""
    if not stores:
        return []
    path = stores[0].path
    above, folders = index_folder(path), []
    if not isinstance(path, RemotePath):
        paths = [str(Path(store.name).absolute()) for store in stores]
        shared = Path(os.path.commonpath(paths)) if len(stores) > 1 else path
        folders = [(shared if shared.is_dir() else shared.parent) / FOLDER]
    return [*folders, *([above] if above else [])]


@functools.lru_cache(maxsize=4)
def _labels(stores: tuple[RecordStore, ...]) -> list[str]:
    """A short name of each store, unlike the others': its path below what all share, without suffix."""
    paths = [Path(store.name).absolute() for store in stores]
    shared = os.path.commonpath([path.parent for path in paths]) if paths else ""
    short = [path.relative_to(shared).with_suffix("").as_posix() for path in paths]
    return short if len(set(short)) == len(short) else [path.relative_to(shared).as_posix() for path in paths]
