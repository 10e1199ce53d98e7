"""Text states computed once and kept: `if-jax embed` writes them, training reads them instead of running the encoder.

Two forms. *exact* holds all 77 positions as the UNet attends them, in bfloat16 (what a bfloat16 encoder makes, bit for
bit), its two byte planes apart so that the shard's compression finds the repeating one. *compact* holds the real tokens
only, as int8 with a scale each, and the mean of the padded ones, which cannot be rebuilt without the encoder: it is an
approximation, several times smaller.

A cache belongs to one encoder, one source and one way of preparing captions, and is refused beside any other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from if_jax.checkpoints.files import sha256_of
from if_jax.data.patterns import expand_home
from if_jax.data.preprocessing import Preparation
from if_jax.data.reading import as_path, in_flight, list_folder, read_chunks, read_file, retried
from if_jax.data.remote import DataPath, RemotePath, RemoteSettings
from if_jax.data.shards import PER_SHARD, RemoteShards, continue_or_clear, finish, write_shard
from if_jax.data.sources import Stored
from if_jax.text.captions import prepare_captions

FORMS = ("exact", "compact")
NOTE = "if_jax.json"
ROWS = "rows.npz"
VERSION = 2  # 2: the source is known by its content

Encode = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]  # captions -> states (B, L, D) bfloat16, tokens (B,)
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class EmbeddingSpec:
    """Everything that decides a cache's bytes."""

    form: str
    encoder: str  # the text encoder's hash
    length: int
    width: int
    source: str
    fingerprint: str  # of the source
    captions: int  # the empty one included
    clean: bool
    preserve_case: bool
    batch_size: int
    version: int = VERSION

    @property
    def raw_bytes(self) -> int:
        """Size before compression."""
        if self.form == "exact":
            return self.captions * self.length * self.width * 2
        return self.captions * (self.length // 4) * self.width  # about a quarter of the positions are tokens


class Embeddings:
    """An opened cache: text states by record number and which of its captions."""

    def __init__(self, folder: str | DataPath, settings: RemoteSettings = RemoteSettings()) -> None:  # noqa: B008 (frozen)
        self.folder = as_path(expand_home(folder), settings) if isinstance(folder, str) else folder
        self.note = _read_note(self.folder)
        self.spec = EmbeddingSpec(**self.note["plan"])
        with np.load(io.BytesIO(read_file(self.folder / ROWS))) as rows:
            self._first, self._hashes = rows["first"], rows["hashes"]
        self._open()

    def __getstate__(self) -> DataPath:
        return self.folder

    def __setstate__(self, folder: DataPath) -> None:
        self.__init__(folder)

    def check(self, stored: Stored, preparation: Preparation, encoder: str = "") -> None:
        """Refuse a cache of another encoder, another source or other preparation.

        Args:
          stored: the source it is to be used with.
          preparation: how captions are to be prepared.
          encoder: the text encoder's hash; "" lets any pass.

        Raises:
          ValueError: one line that names what differs.
        """
        mine = self.spec
        pairs = (
            ("text encoder", mine.encoder[:12], encoder[:12] or mine.encoder[:12]),
            ("source (or the source has changed)", mine.fingerprint[:12], stored.fingerprint()[:12]),
            ("caption cleaning", mine.clean, preparation.clean),
            ("case of captions", mine.preserve_case, preparation.preserve_case),
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
        row = int(self._first[number]) + choice if caption else 0
        if self._hashes[row] != _hash(caption):
            raise ValueError(f"{str(self.folder)!r}: record {number} has another caption now; run `if-jax embed` again")
        return unpack(retried(lambda: self._records[row], self.folder), self.spec)

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

    def _open(self) -> None:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        if isinstance(self.folder, RemotePath):
            list_folder(self.folder)  # one request, not one for each shard
        missing = [name for name in self.note["sha256"] if not (self.folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{self.folder / missing[0]} is missing: run `if-jax embed` again")
        paths = [self.folder / name for name in sorted(self.note["sha256"])]
        if isinstance(self.folder, RemotePath):
            left = range(self.spec.captions, 0, -PER_SHARD)
            self._records = RemoteShards(paths, [min(PER_SHARD, count) for count in left])  # pyright: ignore
        else:
            self._records = ArrayRecordDataSource([str(path) for path in paths])


def read_captions(stored: Stored, preparation: Preparation) -> list[list[str]]:
    """The captions of every record as they go into the encoder."""
    clean, preserve_case = preparation.clean, preparation.preserve_case
    records = in_flight(stored.__getitem__, range(len(stored)), stored.remote)
    return [prepare_captions(record.captions, clean, preserve_case) for record in records]


def make_spec(
    stored: Stored,
    captions: Sequence[Sequence[str]],
    preparation: Preparation,
    *,
    form: str,
    encoder: str,
    length: int,
    width: int,
    batch_size: int,
) -> EmbeddingSpec:
    """What a cache of all captions of a source will be.

    Args:
      stored: the source.
      captions: of every record, as `read_captions` gives them.
      preparation: how they were prepared.
      form: one of `FORMS`.
      encoder: the text encoder's hash.
      length: positions L of the text states.
      width: features D of the text states.
      batch_size: captions encoded at a time.

    Raises:
      ValueError: no such form.
    """
    if form not in FORMS:
        raise ValueError(f"form {form!r} is unknown: choose {' or '.join(FORMS)}")
    return EmbeddingSpec(
        form=form,
        encoder=encoder,
        length=length,
        width=width,
        source=stored.name,
        fingerprint=stored.fingerprint(),
        captions=1 + sum(map(len, captions)),
        clean=preparation.clean,
        preserve_case=preparation.preserve_case,
        batch_size=batch_size,
    )


def write_embeddings(
    captions: Sequence[Sequence[str]],
    spec: EmbeddingSpec,
    encode: Encode,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int], Any] = lambda count: None,
) -> dict[str, Any]:
    """Encode every caption of a source and write the cache; the same call goes on after an interruption.

    Args:
      captions: of every record, as `read_captions` gives them.
      spec: of `make_spec`.
      encode: text states of `spec.batch_size` prepared captions, the same bits whatever stands beside a caption.
      out: the folder to write.
      overwrite: replace an earlier cache at `out`.
      progress: called with the number of captions done since the last call.

    Returns:
      The cache's note: spec, bytes per caption, sha256 of every shard.

    Raises:
      FileExistsError: `out` exists and is not to be replaced, or is no cache.
    """
    out = Path(expand_home(str(out)))
    if out.exists() and not overwrite:
        raise FileExistsError(f"{str(out)!r} exists: choose another --out, or replace it with --overwrite")
    if out.exists() and not (out / ROWS).is_file():
        raise FileExistsError(f"{str(out)!r} is no cache of embeddings and is kept: choose another --out")
    partial = out.parent / f".{out.name}.partial"
    continue_or_clear(partial, dataclasses.asdict(spec))
    every = ["", *(caption for some in captions for caption in some)]
    shards = -(-spec.captions // PER_SHARD)
    notes = {}
    for number in range(shards):
        rows = every[number * PER_SHARD : (number + 1) * PER_SHARD]
        path = partial / f"states-{number:05d}-of-{shards:05d}.array_record"
        notes[path.name] = write_shard(path, lambda rows=rows: _encoded(rows, spec, encode), lambda: {})
        progress(len(rows))
    counts = np.array([len(some) for some in captions], np.int64)
    hashes = np.array([_hash(caption) for caption in every], np.uint64)
    np.savez(partial / ROWS, first=1 + np.cumsum(counts) - counts, hashes=hashes)
    sizes = {name: (partial / name).stat().st_size for name in notes}
    note = {
        "kind": "embeddings",
        "plan": dataclasses.asdict(spec),
        "bytes_per_caption": sum(sizes.values()) / spec.captions,
        "sha256": {name: sha256_of(partial / name) for name in notes},
    }
    (partial / NOTE).write_text(json.dumps(note, indent=1))
    finish(partial, out)
    return note


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
        return np.stack([planes[1], planes[0]], axis=1).view(_BFLOAT16).reshape(spec.length, spec.width)
    tokens = record[0]
    rows = tokens + (tokens < spec.length)
    scale = np.frombuffer(record, np.float32, rows, 1)
    steps = np.frombuffer(record, np.int8, rows * spec.width, 1 + 4 * rows).reshape(rows, spec.width)
    states = steps * scale[:, None]  # (tokens + 1, D); the last row stands for all padding
    return states[np.minimum(np.arange(spec.length), rows - 1)].astype(_BFLOAT16)


def _encoded(captions: Sequence[str], spec: EmbeddingSpec, encode: Encode) -> Iterator[bytes]:
    for start in range(0, len(captions), spec.batch_size):
        some = list(captions[start : start + spec.batch_size])
        states, tokens = encode(some + [""] * (spec.batch_size - len(some)))  # one shape, one compilation
        for row in range(len(some)):
            yield pack(states[row], int(tokens[row]), spec)


def _hash(caption: str) -> int:
    return int.from_bytes(hashlib.blake2b(caption.encode("utf-8", "replace"), digest_size=8).digest(), "little")


def _read_note(folder: DataPath) -> dict[str, Any]:
    path = folder / NOTE
    if not path.is_file() or not (folder / ROWS).is_file():
        raise FileNotFoundError(f"{str(folder)!r} is no cache of embeddings: make one with `if-jax embed`")
    note = json.loads(read_file(path))
    if note["plan"].get("version") != VERSION:
        raise ValueError(f"{str(folder)!r} is a cache of another version: run `if-jax embed` again")
    return note
