"""The rows of an index that are trained on, worked out once for a filter and mapped from the disk from then on.

Rows are numbered through all parts. Those of a small source are worked out in memory each time; those of a large one
are kept in `.if_jax_rows` beside the data (else in the user's cache folder), in a file named after the parts' content,
the filter and the list of what is excluded.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import json
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from if_jax.checkpoints.files import atomic_file
from if_jax.data.exclusions import Exclusions
from if_jax.data.index import Filter, Index
from if_jax.data.index_part import Columns, map_file
from if_jax.data.reading import in_flight

FOLDER = ".if_jax_rows"
_VERSION = 1
_WORTH_KEEPING = 2**18  # records of a source: fewer are filtered in a second
_READ_AHEAD = 8  # parts that are read at a time
_NAMED = 3  # records of each reason that are named


class Skipped(NamedTuple):
    """Records that are not used for one reason."""

    total: int
    names: tuple[str, ...]  # the first few

    @classmethod
    def summary(cls, names: Sequence[str]) -> Skipped:
        """Of all names."""
        return cls(len(names), tuple(names[:_NAMED]))


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
    """Rows that are used, in order."""

    count: int
    fingerprint: str  # a hash of the rows' pictures and captions in order
    skipped: dict[str, Skipped]
    file: Path | None = None  # of the rows; None: they are held
    held: np.ndarray | None = None

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """(N,) uint32 or uint64, mapped where they are in a file."""
        if self.file is None or not self.count:
            return np.zeros(0, np.uint32) if self.held is None else self.held
        kind = np.dtype(f"<u{self.file.stat().st_size // self.count}")
        return np.frombuffer(map_file(self.file, mmap.MADV_RANDOM), kind)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "rows"}  # a map would travel whole


def select_rows(
    indexes: Sequence[Index], labels: Sequence[str], keep: Filter, exclude: Exclusions | None, folders: Sequence[Path]
) -> Selection:
    """The rows that pass a filter, from where they are kept, or worked out and kept.

    Args:
      indexes: of all parts.
      labels: of all parts, unlike each other.
      keep: which usable records are used.
      exclude: records that are not.
      folders: where to look, and to keep them: in the first that can be written.
    """
    total = sum(index.head.count for index in indexes)
    if total < _WORTH_KEEPING:
        return _held(indexes, labels, keep, exclude)
    name = f"rows-{_known(indexes, labels, keep, exclude)}"
    for folder in folders:
        if (kept := _read(folder / name)) is not None:
            return kept
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return _write(folder / name, total, indexes, labels, keep, exclude)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT):
                raise
            logging.warning("%s: the rows that are used cannot be kept there (%s)", folder, error.strerror)
    return _held(indexes, labels, keep, exclude)


def left_out(
    indexes: Sequence[Index], labels: Sequence[str], keep: Filter, exclude: Exclusions | None
) -> dict[str, list[str]]:
    """Every record that is not used by name, for each reason; arguments as of `select_rows`."""
    names: dict[str, list[str]] = {}
    for columns, _, _, dropped, before in _walk(indexes, labels, keep, exclude):
        for reason, rows in dropped.items():
            names.setdefault(reason, []).extend(before + columns.key(row) for row in rows)
    return names


def _walk(
    indexes: Sequence[Index], labels: Sequence[str], keep: Filter, exclude: Exclusions | None
) -> Iterator[tuple[Columns, int, np.ndarray, dict[str, np.ndarray], str]]:
    """Columns, number of the first row, rows used, rows dropped by reason, what stands before keys; span by span."""
    first = 0
    reading = in_flight(Index.read, indexes, len(indexes) > 1, _READ_AHEAD)  # a disk takes its time for each file
    for index, label, columns in zip(indexes, labels, reading, strict=True):
        before = f"{label}: " if len(indexes) > 1 else ""
        for used, dropped in index.select(columns, keep, exclude, label):
            yield columns, first, used, dropped, before
        first += index.head.count


class _Tally:
    """What is known once all rows were walked through."""

    def __init__(self) -> None:
        self.count, self.skipped, self._content = 0, {}, hashlib.sha256()

    def add(self, columns: Columns, used: np.ndarray, dropped: dict[str, np.ndarray], before: str) -> None:
        self.count += len(used)
        self._content.update(columns.facts["content"][used].astype("<u8").tobytes())
        for reason, rows in dropped.items():
            total, names = self.skipped.get(reason, Skipped(0, ()))
            names += tuple(before + columns.key(row) for row in rows[: _NAMED - len(names)])
            self.skipped[reason] = Skipped(total + len(rows), names)

    def selection(self, **rows: Any) -> Selection:
        return Selection(self.count, self._content.hexdigest(), self.skipped, **rows)


def _held(indexes: Sequence[Index], labels: Sequence[str], keep: Filter, exclude: Exclusions | None) -> Selection:
    tally, parts = _Tally(), [np.zeros(0, np.uint32)]
    for columns, first, used, dropped, before in _walk(indexes, labels, keep, exclude):
        tally.add(columns, used, dropped, before)
        parts.append((first + used).astype(_kind(first + len(columns.keys))))
    return tally.selection(held=np.concatenate(parts))


def _write(
    path: Path,
    total: int,
    indexes: Sequence[Index],
    labels: Sequence[str],
    keep: Filter,
    exclude: Exclusions | None,
) -> Selection:
    tally, kind = _Tally(), _kind(total)
    with atomic_file(path) as beside, open(beside, "wb") as file:
        for columns, first, used, dropped, before in _walk(indexes, labels, keep, exclude):
            tally.add(columns, used, dropped, before)
            file.write((first + used).astype(kind).data)
    selection = tally.selection(file=path)
    note = {"version": _VERSION, "size": tally.count * kind.itemsize, "fingerprint": selection.fingerprint}
    with atomic_file(_note(path)) as beside:
        beside.write_text(json.dumps(note | {"count": tally.count, "skipped": tally.skipped}))
    return selection


def _read(path: Path) -> Selection | None:
    """What is kept; None where there is nothing, or only a part of it."""
    try:
        note = json.loads(_note(path).read_text())
        if note["version"] != _VERSION or path.stat().st_size != note["size"]:
            return None
        skipped = {reason: Skipped(total, tuple(names)) for reason, (total, names) in note["skipped"].items()}
        return Selection(note["count"], note["fingerprint"], skipped, path)
    except (OSError, ValueError, KeyError, TypeError):  # working them out again is always right
        return None


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _kind(total: int) -> np.dtype:
    return np.dtype("<u4" if total < 2**32 else "<u8")


def _known(indexes: Sequence[Index], labels: Sequence[str], keep: Filter, exclude: Exclusions | None) -> str:
    parts = [(label, index.head.digest) for label, index in zip(labels, indexes, strict=True)]
    what = (_VERSION, dataclasses.astuple(keep), exclude and exclude.digest(), parts)
    return hashlib.sha256(repr(what).encode("utf-8", "surrogateescape")).hexdigest()[:24]
