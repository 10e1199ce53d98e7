"""One part of an index as a file: Arrow columns that are mapped from the disk, so that opening reads no row.

A part is of one store: a tar, a table, a folder. What must be known of it before any row (what it was made of, how many
rows it has, the reasons met) stands in the file's footer.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from if_jax.data.reading import read_file, retried

VERSION = 4  # 4: Arrow columns in place of an .npz
SUFFIX = ".index"
OLD_SUFFIX = ".npz"  # behind the name, of versions up to 3
# Columns of img2dataset's and LAION's metadata, under the names they are found with.
SCORES = {
    "clip": ("similarity", "clip_score", "clip_similarity", "SIMILARITY"),
    "aesthetic": ("aesthetic", "aesthetic_score", "AESTHETIC_SCORE", "prediction"),
    "watermark": ("pwatermark", "watermark", "WATERMARK"),
}
FACTS = np.dtype(
    [
        *(("width", "i4"), ("height", "i4"), ("caption", "i4"), *((name, "f4") for name in SCORES)),
        *(("flaw", "u2"), ("content", "u8")),  # content: a hash of the stored picture and its captions
        ("url", "u8"),  # a hash of the address it was fetched from; 0: not known
    ]
)
_MAPPED = 256  # parts of this process that stay mapped: what is touched of them counts as its memory
_READ_WHOLE = 2**24  # bytes of a part that is read rather than mapped to go through it
_META = b"if_jax"
_LARGEST_COLUMN = 2**31 - 1  # bytes of keys that offsets of 32 bits reach


class DamagedPart(ValueError):
    """A file that is no whole part, or of another version; its text says which."""


@dataclasses.dataclass(frozen=True)
class Head:
    """What is known of a part without a look at its rows."""

    fingerprint: str  # of the store as it was gone through: changes with times
    files: str  # hash of the store's names and sizes
    count: int
    digest: str  # of all columns
    flaws: tuple[str, ...]  # "" and the reasons met; a row's `flaw` is a number into them
    check: str = "decode"  # how the pictures were looked at


@dataclasses.dataclass(frozen=True, eq=False)
class Columns:
    """The rows of a part, one for each record, the flawed ones included."""

    keys: Any  # (N,) pyarrow binary, UTF-8
    places: np.ndarray  # (N, P) int32 or int64
    facts: dict[str, np.ndarray]  # (N,) each, of FACTS; flaw 0: none

    def key(self, row: int) -> str:
        """A record's name."""
        return self.keys[row].as_py().decode()

    def digest(self, flaws: Sequence[str]) -> str:
        """A hash of all columns and of what the flaws' numbers mean."""
        known = hashlib.sha256(repr((self.places.shape, str(self.places.dtype), tuple(flaws))).encode())
        keys = self.keys.to_pylist()
        known.update(np.fromiter(map(len, keys), "<i8", len(keys)).data)
        known.update(b"".join(keys))
        for column in (self.places, *self.facts.values()):
            known.update(np.ascontiguousarray(column).data)
        return known.hexdigest()[:32]


def make_columns(keys: Sequence[bytes], places: np.ndarray, facts: np.ndarray) -> Columns:
    """Columns out of rows.

    Args:
      keys: N, UTF-8.
      places: (N, P) of whole numbers, kept in 32 bits where they fit.
      facts: (N,) of `FACTS`.
    """
    import pyarrow

    small = not places.size or np.abs(places).max() <= np.iinfo(np.int32).max
    kind = pyarrow.binary() if sum(map(len, keys)) < _LARGEST_COLUMN else pyarrow.large_binary()
    columns = {name: np.ascontiguousarray(facts[name]) for name in FACTS.names or ()}
    return Columns(pyarrow.array(keys, kind), places.astype(np.int32 if small else np.int64), columns)


def write_part(sink: Any, head: Head, columns: Columns) -> None:
    """Write a part; the same rows are the same bytes under one pyarrow.

    Args:
      sink: a file or stream that pyarrow writes to.
      head: of the part.
      columns: its rows.
    """
    import pyarrow
    import pyarrow.ipc

    values = pyarrow.array(np.ascontiguousarray(columns.places).reshape(-1))
    places = pyarrow.FixedSizeListArray.from_arrays(values, columns.places.shape[1])
    batch = pyarrow.record_batch({"key": columns.keys, "place": places, **columns.facts})
    meta = json.dumps({"version": VERSION, **dataclasses.asdict(head)})
    batch = batch.replace_schema_metadata({_META: meta.encode("utf-8", "surrogateescape")})
    with pyarrow.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def read_head(source: Path | bytes) -> Head:
    """The head of a part.

    Args:
      source: its file, or its bytes.

    Raises:
      DamagedPart: it is cut off, none, or of another version.
      OSError: the disk failed.
    """
    return _parse(_open(source if isinstance(source, bytes) else map_file(source, mmap.MADV_RANDOM)))


def map_columns(file: Path, head: Head) -> Columns:
    """The columns of a part, mapped from its file.

    Args:
      file: of the part.
      head: as `read_head` gave it.

    Raises:
      ValueError: another part has taken the file's place since.
    """
    return _checked(file, head, _map(file, head.digest))


def read_columns(file: Path, head: Head) -> Columns:
    """The columns of a part for one pass over all of them; arguments and errors as of `map_columns`."""
    content = (
        read_file(file) if retried(file.stat, file).st_size <= _READ_WHOLE else map_file(file, mmap.MADV_SEQUENTIAL)
    )
    return _checked(file, head, _parts(file, content))


def hold_columns(content: bytes) -> tuple[Head, Columns]:
    """The head and columns of a part that is held in memory; errors as of `read_head`."""
    reader = _open(content)
    return _parse(reader), _columns(reader)


@functools.lru_cache(_MAPPED)
def _map(file: Path, digest: str) -> tuple[Head, Columns]:
    return _parts(file, map_file(file, mmap.MADV_RANDOM))


def _parts(file: Path, content: bytes | mmap.mmap) -> tuple[Head, Columns]:
    try:
        reader = _open(content)
        return _parse(reader), _columns(reader)
    except DamagedPart:
        raise ValueError(f"{str(file)!r} was damaged while it was in use: start again") from None


def _checked(file: Path, head: Head, stored: tuple[Head, Columns]) -> Columns:
    if stored[0].digest != head.digest:
        _map.cache_clear()
        raise ValueError(f"{str(file)!r} was made anew while it was in use: start again")
    return stored[1]


def map_file(file: Path, advice: int) -> bytes | mmap.mmap:
    """A file mapped for reading.

    Args:
      file: not empty, else it is b"".
      advice: MADV_RANDOM where single rows are looked up: a page is read, not the 128 kB about it.
    """

    def map_it() -> bytes | mmap.mmap:
        with open(file, "rb") as opened:
            if not os.fstat(opened.fileno()).st_size:
                return b""
            content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        content.madvise(advice)
        return content

    return retried(map_it, file)


def _open(content: bytes | mmap.mmap) -> Any:
    import pyarrow
    import pyarrow.ipc

    try:
        return pyarrow.ipc.open_file(pyarrow.BufferReader(pyarrow.py_buffer(content)))
    except (pyarrow.ArrowInvalid, EOFError):
        raise DamagedPart("cut off or damaged") from None


def _parse(reader: Any) -> Head:
    try:
        meta = json.loads((reader.schema.metadata or {})[_META].decode("utf-8", "surrogateescape"))
        if meta.pop("version") != VERSION:
            raise DamagedPart("of another version")
        return Head(**meta | {"flaws": tuple(meta["flaws"])})
    except (KeyError, ValueError, TypeError) as error:
        if isinstance(error, DamagedPart):
            raise
        raise DamagedPart("damaged") from None


def _columns(reader: Any) -> Columns:
    import pyarrow

    try:
        batch = reader.get_batch(0)
        places = batch.column("place")
        values = places.values.to_numpy().reshape(-1, places.type.list_size)
        facts = {name: batch.column(name).to_numpy() for name in FACTS.names or ()}
        return Columns(batch.column("key"), values, facts)
    except (pyarrow.ArrowException, KeyError):
        raise DamagedPart("damaged") from None
