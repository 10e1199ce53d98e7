"""What is known of every stored record before training begins: its place, size, caption length, scores, and its flaw.

A store (a tar file, a folder of pictures, a prepared data set) is gone through once. What cannot be used stays in the
index with its reason. The index is a file beside the store (or in the user's cache folder where that cannot be written,
and a copy there of what lies in a bucket), of which only what is asked for is read. It belongs to exactly those bytes:
a store that has changed since is refused, because a run that continued on it would see other pictures in another order.
Where only the times of its files differ, as in a copy, it is gone through again and compared record by record.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import io
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import logging

from if_jax.checkpoints.files import atomic_file, user_cache
from if_jax.data.exclusions import REASON, Exclusions
from if_jax.data.index_part import (
    OLD_SUFFIX,
    SUFFIX,
    Columns,
    DamagedPart,
    Head,
    hold_columns,
    map_columns,
    read_columns,
    read_head,
    write_part,
)
from if_jax.data.patterns import expand_home
from if_jax.data.reading import read_file, retried
from if_jax.data.records import RecordStore, hash_files
from if_jax.data.remote import DataPath, RemotePath

_SPAN = 2**20  # rows that are filtered at a time


@dataclasses.dataclass(frozen=True)
class Filter:
    """Which usable records are trained on; 0 lets all pass, and so does a column that the metadata has not."""

    min_side: int = 0  # pixels; at least the size trained at in any case
    max_aspect: float = 0.0  # longer side over shorter side
    min_caption: int = 0  # characters
    max_caption: int = 0
    min_clip: float = 0.0  # CLIP score of picture and caption ("similarity")
    min_aesthetic: float = 0.0  # aesthetic score
    max_watermark: float = 0.0  # probability of a watermark

    def at_least(self, side: int) -> Filter:
        """The filter of what is trained on at `side` pixels: nothing is scaled up."""
        return dataclasses.replace(self, min_side=max(self.min_side, side))


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
    """The records of one store, the flawed ones included: in a file that is mapped when rows are asked for."""

    head: Head
    file: Path | None = None  # None: nothing can be written, so that it is held
    held: Columns | None = None

    @property
    def columns(self) -> Columns:
        """All rows; ValueError where the file is another one by now."""
        if self.held is not None:
            return self.held
        assert self.file is not None
        return map_columns(self.file, self.head)

    def key(self, row: int) -> str:
        """A record's name."""
        return self.columns.key(row)

    def same_records(self, other: Index) -> bool:
        """Whether another index is of the same usable records in the same rows."""
        return np.array_equal(self.columns.facts["content"], other.columns.facts["content"])

    def read(self) -> Columns:
        """All rows, for one pass over them."""
        if self.held is not None:
            return self.held
        assert self.file is not None
        return read_columns(self.file, self.head)

    def select(
        self, columns: Columns, keep: Filter, exclude: Exclusions | None = None, label: str = ""
    ) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Rows to train on, and those left out by reason, span by span; together every row once.

        Args:
          columns: of `read`.
          keep: which usable records are used.
          exclude: records that are not.
          label: of the store, as `exclude` may name it.

        Yields:
          Rows in order, (n,) int64, and for each reason likewise.
        """
        for start in range(0, self.head.count, _SPAN):
            yield self._select(columns, start, keep, exclude, label)

    def _select(
        self, columns: Columns, start: int, keep: Filter, exclude: Exclusions | None, label: str
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        span = slice(start, start + _SPAN)
        facts = {name: column[span] for name, column in columns.facts.items()}
        why = facts["flaw"].astype(np.uint16)  # a number into `reasons`
        reasons, free = list(self.head.flaws), why == 0
        if exclude is not None:
            listed = exclude.matches(columns.keys[span], facts["url"], label)
            why[free & listed] = len(reasons)
            reasons.append(REASON)
            free &= ~listed
        short, long = (pick(facts["width"], facts["height"]) for pick in (np.minimum, np.maximum))
        tests = (
            (keep.min_side, f"smaller than {keep.min_side} px", lambda: short < keep.min_side),
            (
                keep.max_aspect,
                f"longer than {keep.max_aspect:g} times its width",
                lambda: long > keep.max_aspect * short,
            ),
            (
                keep.min_caption,
                f"caption shorter than {keep.min_caption}",
                lambda: facts["caption"] < keep.min_caption,
            ),
            (keep.max_caption, f"caption longer than {keep.max_caption}", lambda: facts["caption"] > keep.max_caption),
            (keep.min_clip, f"CLIP score below {keep.min_clip:g}", lambda: facts["clip"] < keep.min_clip),
            (
                keep.min_aesthetic,
                f"aesthetic below {keep.min_aesthetic:g}",
                lambda: facts["aesthetic"] < keep.min_aesthetic,
            ),
            (
                keep.max_watermark,
                f"watermark above {keep.max_watermark:g}",
                lambda: facts["watermark"] > keep.max_watermark,
            ),
        )
        for limit, words, fails in tests:
            if limit:
                failing = fails()
                why[free & failing] = len(reasons)
                reasons.append(words)
                free &= ~failing
        met = np.flatnonzero(np.bincount(why[~free]))
        left_out = {reasons[number]: start + np.flatnonzero((why == number) & ~free) for number in met}
        return start + np.flatnonzero(free), dict(sorted(left_out.items()))


def load_index(store: RecordStore, *, reindex: bool = False) -> Index | None:
    """The index kept for a store; None where there is none yet, or the times of the store's files are others.

    Args:
      store: whose index it is.
      reindex: take an index that no longer fits for none.

    Raises:
      ValueError: the store has changed since it was indexed, and `reindex` is false.
    """
    index = read_index(store)
    if index is None or index.head.fingerprint == store.fingerprint():
        return index
    if index.head.files != hash_files(store) and not reindex:
        raise ValueError(changed(store))
    return None


def read_index(store: RecordStore, *, quiet: bool = False) -> Index | None:
    """The index that is kept for a store, whether it still fits or not; None for what is damaged or of another version.

    Args:
      store: whose index it is.
      quiet: do not name what is damaged or of another version.
    """
    say = logging.debug if quiet else logging.warning
    place = index_place(store)
    if place is None:
        old = next((path for path in map(_old, index_places(store)) if path.is_file()), None)
        if old is not None:
            say("%s is an index of another version: %s is indexed again, once", old, store.name)
        return None
    try:
        if not isinstance(place, RemotePath):
            return Index(read_head(place), place)
        copy = _copied(place)
        return Index(read_head(copy), copy) if isinstance(copy, Path) else Index(*_held(copy))
    except DamagedPart as flaw:  # going through the store again is always right
        say("%s is %s: %s is indexed again", place, flaw, store.name)
        return None


def save_index(store: RecordStore, head: Head, columns: Columns, *, beside: bool = False) -> Index:
    """Keep an index for the next time, whole or not at all; where nothing can be written it is held in memory.

    Args:
      store: what was indexed.
      head: of its index.
      columns: its rows.
      beside: nowhere but beside the store.

    Raises:
      OSError, ValueError: `beside`, and it cannot be written there; one line.
    """
    failed, kept = "", False
    for place in index_places(store):
        try:
            if isinstance(place, RemotePath):
                stored = io.BytesIO()
                write_part(stored, head, columns)
                place.write_bytes(stored.getvalue())
                kept = True
                if beside:
                    return Index(head, held=columns)
                continue  # into the user's cache folder as well, where it is mapped from
            place.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(place) as partial:  # hosts may write at the same time
                write_part(str(partial), head, columns)
            return Index(head, place)
        except (OSError, ValueError) as error:  # a bucket that this account may only read; a full disk
            if beside:
                number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
                reason = os.strerror(number) if isinstance(error, OSError) else str(error)
                raise OSError(number, f"the index cannot be written there ({reason})", str(place)) from None
            failed = failed or " ".join(str(error).split())
    if not kept:
        logging.warning("the index of %s cannot be kept (%s): it is made again the next time", store.name, failed)
    return Index(head, held=columns)


def index_place(store: RecordStore) -> DataPath | None:
    """The file or object that holds a store's index; None where there is none."""
    return next((path for path in index_places(store) if path.is_file()), None)


def index_folder(path: DataPath) -> Path | None:
    """Where files of an index lie that do not lie beside the data; None for a user without a home."""
    if isinstance(path, RemotePath) and path.settings.cache_folder:
        return Path(expand_home(path.settings.cache_folder)) / "indexes"
    cache = user_cache()
    return cache and cache / "indexes"


def changed(store: RecordStore) -> str:
    """The line that refuses a store which is no longer what was indexed."""
    return (
        f"{store.name} has changed since it was indexed, and would give other pictures in another order: "
        f"`if-jax data inspect {shlex.quote(store.name)} --reindex` indexes it again, for new runs"
    )


def index_places(store: RecordStore) -> Iterator[DataPath]:
    """Where a store's index may be kept, the best place first."""
    beside = store.index_file()
    yield beside
    if (folder := index_folder(store.path)) is not None:
        yield folder / f"{_known(beside)}{SUFFIX}"


def _old(place: DataPath) -> DataPath:
    return place.with_name(place.name + OLD_SUFFIX)


def _known(path: DataPath) -> str:
    return hashlib.sha256(str(path.absolute()).encode("utf-8", "surrogateescape")).hexdigest()[:24]


def _copied(place: RemotePath) -> Path | bytes:
    """A part of a bucket on this disk, fetched if this version is not there; its bytes where none can be written."""
    folder = index_folder(place)
    version = hashlib.sha256(repr(retried(place.stat, place)).encode()).hexdigest()[:8]
    if folder is None:
        return read_file(place)
    file = folder / f"{_known(place)}-{version}{SUFFIX}"
    if file.is_file():
        return file
    content = read_file(place)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as beside:
            beside.write_bytes(content)
    except OSError as error:
        _warn_full(folder, str(error))
        return content
    for older in folder.glob(f"{_known(place)}*{SUFFIX}"):
        if older != file:
            older.unlink(missing_ok=True)
    return file


def _held(content: bytes) -> tuple[Head, None, Columns]:
    head, columns = hold_columns(content)
    return head, None, columns


@functools.lru_cache
def _warn_full(folder: Path, error: str) -> None:
    logging.warning("indexes cannot be kept in %s (%s): they are held in memory", folder, error)
