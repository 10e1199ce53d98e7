"""Text states computed once and kept: `if-jax embed` writes them, training reads them instead of running the encoder.

Two forms. *exact* holds all 77 positions as the UNet attends them, in bfloat16 (what a bfloat16 encoder makes, bit for
bit), its two byte planes apart so that the shard's compression finds the repeating one. *compact* holds the real tokens
only, as int8 with a scale each, and the mean of the padded ones, which cannot be rebuilt without the encoder: it is an
approximation, several times smaller.

A shard holds the captions of so many records, whatever the others hold: so shards are made by any number of processes,
and reading one caption takes the table of its shard, not of all. The manifest comes last and makes a cache of them.

A cache belongs to one encoder, one source and one way of preparing captions, and is refused beside any other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from if_jax.data.patterns import expand_home
from if_jax.data.preprocessing import Preparation
from if_jax.data.reading import as_path, is_transient, list_folder, read_chunks, read_file, retried
from if_jax.data.remote import DataPath, RemoteError, RemoteSettings
from if_jax.data.shards import ShardReaders
from if_jax.data.sources import Stored

FORMS = ("exact", "compact")
NOTE = "if_jax.json"  # the manifest, which is written last
VERSION = 3  # 3: a shard holds the captions of so many records, and knows them
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_KEPT_TABLES = 1024  # of 12 kB each


@dataclasses.dataclass(frozen=True)
class EmbeddingSpec:
    """Everything that decides a cache's bytes."""

    form: str
    encoder: str  # the text encoder's hash
    length: int
    width: int
    source: str
    fingerprint: str  # of the source
    records: int  # of the source
    per_shard: int  # records whose captions one shard holds
    clean: bool
    preserve_case: bool
    batch_size: int
    version: int = VERSION

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return -(-self.records // self.per_shard)

    @property
    def raw_bytes(self) -> int:
        """Size of one caption before compression."""
        if self.form == "exact":
            return self.length * self.width * 2
        return self.length // 4 * self.width  # about a quarter of the positions are tokens

    def shard_name(self, shard: int) -> str:
        """The file of a shard."""
        return f"states-{shard:05d}-of-{self.shards:05d}.array_record"

    def span(self, shard: int) -> range:
        """Numbers of the records whose captions a shard holds."""
        return range(shard * self.per_shard, min((shard + 1) * self.per_shard, self.records))


class Table(NamedTuple):
    """What a shard's last record says of the others: row 0 is the empty caption, then come those of each record."""

    ends: np.ndarray  # (R + 1,) int64, rows before the captions of record r, and of the one behind the last
    hashes: np.ndarray  # (rows,) uint64, of `hash_caption`

    @classmethod
    def of(cls, counts: Sequence[int], captions: Sequence[int]) -> Table:
        """The table of R records.

        Args:
          counts: (R,) captions of each.
          captions: hashes of all captions, the empty one first.
        """
        ends = 1 + np.concatenate([[0], np.cumsum(np.asarray(counts, np.int64))])
        return cls(ends, np.asarray(captions, np.uint64))

    def pack(self) -> bytes:
        """As a record."""
        counts = np.diff(self.ends).astype("<u4")
        return len(counts).to_bytes(4, "little") + counts.tobytes() + self.hashes.astype("<u8").tobytes()

    @classmethod
    def unpack(cls, record: bytes) -> Table:
        """From a record."""
        count = int.from_bytes(record[:4], "little")
        counts = np.frombuffer(record, "<u4", count, 4)
        return cls.of(counts.tolist(), np.frombuffer(record, "<u8", -1, 4 + 4 * count).tolist())


class Embeddings:
    """An opened cache: text states by record number and which of its captions."""

    def __init__(self, folder: str | DataPath, settings: RemoteSettings = RemoteSettings()) -> None:  # noqa: B008 (frozen)
        self.folder = as_path(expand_home(folder), settings) if isinstance(folder, str) else folder
        self.note = _read_note(self.folder)
        self.spec = EmbeddingSpec(**self.note["plan"])
        names = [self.spec.shard_name(shard) for shard in range(self.spec.shards)]
        missing = sorted({*names}.difference(entry.name for entry in list_folder(self.folder)))
        if missing:
            raise FileNotFoundError(f"{self.folder / missing[0]} is missing: run `if-jax embed` again")
        self._readers = ShardReaders([self.folder / name for name in names])
        self._tables: OrderedDict[int, Table] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> DataPath:
        return self.folder

    def __setstate__(self, folder: DataPath) -> None:
        self.__init__(folder)

    @property
    def captions(self) -> int:
        """How many captions there are, the empty one not counted."""
        return self.note["captions"]

    def check(
        self, stored: Stored, preparation: Preparation, encoder: str = "", shape: tuple[int, int] | None = None
    ) -> None:
        """Refuse a cache of another encoder, another source or other preparation.

        Args:
          stored: the source it is to be used with.
          preparation: how captions are to be prepared.
          encoder: the text encoder's hash; "" lets any pass.
          shape: (L, D) of the text states that are wanted; None lets any pass.

        Raises:
          ValueError: one line that names what differs.
        """
        mine = self.spec
        pairs = (
            ("text encoder", mine.encoder[:12], encoder[:12] or mine.encoder[:12]),
            ("source (or the source has changed)", mine.fingerprint[:12], stored.fingerprint()[:12]),
            ("caption cleaning", mine.clean, preparation.clean),
            ("case of captions", mine.preserve_case, preparation.preserve_case),
            ("length or width of text states", (mine.length, mine.width), shape or (mine.length, mine.width)),
        )
        for what, cached, wanted in pairs:
            if cached != wanted:
                raise ValueError(
                    f"{str(self.folder)!r} was made with another {what} ({cached}, here {wanted}): "
                    "run `if-jax embed` again"
                )

    def states(self, number: int, choice: int, caption: str) -> np.ndarray:
        """The text states of one caption.

        Args:
          number: of the record.
          choice: which of its captions.
          caption: prepared; "" is the empty one, whatever the record.

        Returns:
          (L, D) bfloat16.

        Raises:
          ValueError: the caption is not the one that was encoded.
        """
        shard, row = divmod(number, self.spec.per_shard)
        table, place = self._table(shard), 0
        if caption:
            first, end = table.ends[row : row + 2]
            place = int(first) + choice if first + choice < end else -1
        if place < 0 or table.hashes[place] != hash_caption(caption):
            raise ValueError(f"{str(self.folder)!r}: record {number} has another caption now; run `if-jax embed` again")
        return unpack(self._read(shard, place), self.spec)

    def fingerprint(self) -> str:
        """A hash of the shards' checksums, wherever the cache lies."""
        return hashlib.sha256(json.dumps(self.note["sha256"], sort_keys=True).encode()).hexdigest()[:32]

    def verify(self) -> None:
        """Read every shard and compare it with its checksum; ValueError names the first that differs."""
        for name, expected in self.note["sha256"].items():
            digest = hashlib.sha256()
            for chunk in read_chunks(self.folder / name):
                digest.update(chunk)
            if digest.hexdigest() != expected:
                raise ValueError(f"{self.folder / name} is damaged: run `if-jax embed` again")

    def _table(self, shard: int) -> Table:
        with self._lock:
            table = self._tables.get(shard)
        if table is None:
            table = Table.unpack(self._read(shard, -1))
            with self._lock:
                self._tables[shard] = table
                if len(self._tables) > _KEPT_TABLES:
                    self._tables.popitem(last=False)
        return table

    def _read(self, shard: int, row: int) -> bytes:
        try:
            return retried(lambda: self._readers.read(shard, row), self.folder)
        except (RemoteError, FileNotFoundError):
            raise
        except Exception as error:  # whatever the reader stumbles over in damaged bytes
            if is_transient(error):
                raise
            path = self.folder / self.spec.shard_name(shard)
            raise ValueError(f"{path} is damaged or cut off: put it back, or run `if-jax embed` again") from None


def pack(states: np.ndarray, tokens: int, spec: EmbeddingSpec) -> bytes:
    """One caption's text states as a record.

    Args:
      states: (L, D) bfloat16.
      tokens: how many of the L positions are not padding.
      spec: of the cache; its form decides the bytes.
    """
    if spec.form == "exact":
        planes = np.ascontiguousarray(states).view(np.uint8).reshape(-1, 2)
        return planes[:, 1].tobytes() + planes[:, 0].tobytes()
    real = states[:tokens].astype(np.float32)
    tail = states[tokens:].astype(np.float32)
    rows = np.concatenate([real, tail.mean(0, keepdims=True)]) if len(tail) else real
    scale = np.maximum(np.abs(rows).max(1), 1e-30).astype(np.float32) / np.float32(127)
    steps = np.round(rows / scale[:, None]).astype(np.int8)
    return bytes([tokens]) + scale.tobytes() + steps.tobytes()


def unpack(record: bytes, spec: EmbeddingSpec) -> np.ndarray:
    """The states (L, D) bfloat16 of a record of `spec.form`."""
    if spec.form == "exact":
        half = spec.length * spec.width
        planes = np.frombuffer(record, np.uint8).reshape(2, half)
        return np.stack([planes[1], planes[0]], axis=1).view(BFLOAT16).reshape(spec.length, spec.width)
    tokens = record[0]
    rows = tokens + (tokens < spec.length)
    scale = np.frombuffer(record, np.float32, rows, 1)
    steps = np.frombuffer(record, np.int8, rows * spec.width, 1 + 4 * rows).reshape(rows, spec.width)
    states = steps * scale[:, None]  # (tokens + 1, D); the last row stands for all padding
    return states[np.minimum(np.arange(spec.length), rows - 1)].astype(BFLOAT16)


def hash_caption(caption: str) -> int:
    """64 bits that stand for a prepared caption."""
    return int.from_bytes(hashlib.blake2b(caption.encode("utf-8", "replace"), digest_size=8).digest(), "little")


def _read_note(folder: DataPath) -> dict[str, Any]:
    path = folder / NOTE
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} is no cache of embeddings: make one with `if-jax embed`")
    note = json.loads(read_file(path))
    if note.get("kind") != "embeddings":
        raise FileNotFoundError(f"{str(folder)!r} is a data set, no cache of embeddings: make one with `if-jax embed`")
    if note["plan"].get("version") != VERSION:
        raise ValueError(f"{str(folder)!r} is a cache of another version: run `if-jax embed` again")
    return note
