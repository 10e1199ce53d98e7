"""How a cache of text states comes to be: shard by shard, in any order and by any process, and a manifest at last.

On a disk it is built in a hidden folder beside its place, which is renamed. A bucket renames nothing: there the shards
lie where they belong from the start, and are no cache before the manifest is there.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from if_jax.checkpoints.files import sha256_of
from if_jax.data.embeddings import FORMS, NOTE, EmbeddingSpec, Table, hash_caption, pack
from if_jax.data.preprocessing import Preparation
from if_jax.data.reading import in_flight, list_folder, read_file
from if_jax.data.remote import DataPath, RemotePath, forget_listings
from if_jax.data.shards import PER_SHARD, continue_or_clear, finish, note_of, write_shard
from if_jax.data.sources import Stored
from if_jax.text.captions import prepare_captions

Encode = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]  # captions -> states (B, L, D) bfloat16, tokens (B,)
_PLAN = ".plan.json"


def make_spec(
    stored: Stored, preparation: Preparation, *, form: str, encoder: str, length: int, width: int, batch_size: int
) -> EmbeddingSpec:
    """What a cache of all captions of a source will be.

    Args:
      stored: the source.
      preparation: how its captions are prepared.
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
        records=len(stored),
        per_shard=PER_SHARD,
        clean=preparation.clean,
        preserve_case=preparation.preserve_case,
        batch_size=batch_size,
    )


def captions_of(stored: Stored, numbers: range, spec: EmbeddingSpec) -> Iterator[list[str]]:
    """The captions of records as they go into the encoder, a few records ahead of what is taken.

    Args:
      stored: the source.
      numbers: of the records.
      spec: of the cache.
    """
    for captions in in_flight(stored.captions, numbers, stored.remote):
        yield prepare_captions(captions, spec.clean, spec.preserve_case)


def shard_records(
    stored: Stored, shard: int, spec: EmbeddingSpec, encode: Encode, progress: Callable[[int], Any]
) -> Iterator[bytes]:
    """The records of one shard, its table last. No more than a batch of captions is held at a time.

    Args:
      stored: the source.
      shard: its number.
      spec: of the cache.
      encode: text states of `spec.batch_size` prepared captions, the same bits whatever stands beside a caption.
      progress: called with the number of records done since the last call.
    """
    counts: list[int] = []
    hashes: list[int] = []

    def captions() -> Iterator[str]:
        yield ""
        for prepared in captions_of(stored, spec.span(shard), spec):
            counts.append(len(prepared))
            yield from prepared

    rows, done = captions(), 0
    while some := list(itertools.islice(rows, spec.batch_size)):
        hashes += map(hash_caption, some)
        states, tokens = encode(some + [""] * (spec.batch_size - len(some)))  # one shape, one compilation
        for row in range(len(some)):
            yield pack(states[row], int(tokens[row]), spec)
        progress(len(counts) - done)
        done = len(counts)
    yield Table.of(counts, hashes).pack()


@dataclasses.dataclass(frozen=True)
class CacheFolder:
    """Where a cache is built; the same calls go on after an interruption."""

    out: DataPath  # where it will be
    spec: EmbeddingSpec

    @property
    def folder(self) -> DataPath:
        """Where it is until it is complete."""
        return self.out if isinstance(self.out, RemotePath) else self.out.parent / f".{self.out.name}.partial"

    def begin(self, overwrite: bool = False) -> None:
        """Makes the folder, or goes on in it: one process does so, before the others look.

        Args:
          overwrite: an earlier cache will be replaced.

        Raises:
          FileExistsError: there is an earlier cache that is not to be replaced, or something else.
        """
        out, plan = self.out, dataclasses.asdict(self.spec)
        if isinstance(out, RemotePath):
            if (out / NOTE).is_file():
                raise FileExistsError(f"{str(out)!r} exists: choose another --out, or remove it from the bucket first")
            noted = out / _PLAN
            if not noted.is_file():
                if out.exists():
                    raise FileExistsError(f"{str(out)!r} holds something else: choose another --out")
                noted.write_bytes(json.dumps(plan).encode())
            elif json.loads(read_file(noted)) != plan:
                raise FileExistsError(
                    f"{str(out)!r} holds the beginning of a cache of another source, encoder or form: choose another "
                    "--out, or remove it from the bucket first"
                )
            return
        if out.exists() and not overwrite:
            raise FileExistsError(f"{str(out)!r} exists: choose another --out, or replace it with --overwrite")
        if out.exists() and not _is_cache(out):
            raise FileExistsError(f"{str(out)!r} is no cache of embeddings and is kept: choose another --out")
        continue_or_clear(Path(str(self.folder)), plan)

    def open_shards(self) -> list[int]:
        """Numbers of the shards that are not complete.

        Raises:
          FileNotFoundError: this host does not see what `begin` has made on another.
        """
        try:
            names = {entry.name for entry in list_folder(self.folder)}
        except FileNotFoundError:
            names = set()
        forget_listings()  # they grow
        if _PLAN not in names:
            raise FileNotFoundError(
                f"{self.folder} is not seen here, where process 0 has made it: give an --out that all hosts share, "
                "such as a gs:// path"
            )
        return [shard for shard in range(self.spec.shards) if self._note(shard).name not in names]

    def write(self, shard: int, records: Callable[[], Iterator[bytes]]) -> None:
        """Writes one shard, which no other process does."""
        path = self.folder / self.spec.shard_name(shard)
        write_shard(path, records, lambda file: {"sha256": sha256_of(file), "size": file.stat().st_size})

    def close(self) -> dict[str, Any]:
        """Makes a cache of shards that are all complete: one process does so. Returns the manifest."""
        remote = isinstance(self.out, RemotePath)
        read = lambda shard: json.loads(read_file(self._note(shard)))  # noqa: E731
        notes = list(in_flight(read, range(self.spec.shards), remote))
        captions = sum(note["count"] for note in notes) - 2 * len(notes)  # without the empty one and the table
        manifest = {
            "kind": "embeddings",
            "plan": dataclasses.asdict(self.spec),
            "captions": captions,
            "bytes_per_caption": sum(note["size"] for note in notes) / (captions + len(notes)),
            "sha256": {self.spec.shard_name(shard): note["sha256"] for shard, note in enumerate(notes)},
        }
        content = json.dumps(manifest, indent=1).encode()
        (self.folder / NOTE).write_bytes(content)
        if isinstance(self.out, RemotePath):
            for shard in range(self.spec.shards):
                self._note(shard).unlink()
            (self.out / _PLAN).unlink()
        else:
            finish(Path(str(self.folder)), self.out)
        return manifest

    def _note(self, shard: int) -> DataPath:
        return note_of(self.folder / self.spec.shard_name(shard))


def _is_cache(folder: Path) -> bool:
    try:
        return json.loads((folder / NOTE).read_text())["kind"] == "embeddings"
    except (OSError, ValueError, KeyError, TypeError):
        return False
