"""What a store of records is: something that is gone through once, and read by place from then on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from if_jax.data.preprocessing import UnusableRecord
from if_jax.data.reading import retried
from if_jax.data.remote import DataPath


class Record(NamedTuple):
    """One stored picture with everything that says what it shows."""

    key: str
    picture: bytes  # as stored, still encoded
    captions: tuple[str, ...]  # one, or several to choose from
    metadata: Mapping[str, Any]


class RecordStore(Protocol):
    """A file or folder of records that is indexed as a whole. `place` is what it needs to find a record again."""

    name: str
    path: DataPath
    kind: str  # of store, in words

    def fingerprint(self) -> str:
        """Changes when the stored bytes may have."""
        ...

    def files(self) -> list[tuple[str, int]]:
        """Names and sizes of what is stored: in these the copies on two hosts must agree, times may differ."""
        ...

    def index_file(self) -> DataPath:
        """Where its index is kept."""
        ...

    def scan(self) -> Iterable[tuple[str, tuple[int, ...], Record | UnusableRecord]]:
        """Everything there, in order: key, place, and the record or why it is none."""
        ...

    def read(self, key: str, place: Sequence[int]) -> Record:
        """One record again."""
        ...


class SingleFile:
    """The half of a `RecordStore` that is the same for every store of one file.

    Args:
      path: of the file.
    """

    def __init__(self, path: DataPath) -> None:
        self.path, self.name = path, str(path)

    def fingerprint(self) -> str:
        """Size and time of the file, or an object's checksum: what says that it was written again."""
        status = retried(self.path.stat, self.path)
        return f"{status.st_size} bytes of {status.st_mtime_ns}"

    def files(self) -> list[tuple[str, int]]:
        """Name and size of the file."""
        return [(self.path.name, retried(self.path.stat, self.path).st_size)]

    def index_file(self) -> DataPath:
        """Beside the file."""
        return self.path.with_name(f"{self.path.name}.index")


def hash_files(store: RecordStore) -> str:
    """A hash of names and sizes: the same for a copy with other times."""
    return hashlib.sha256(repr(store.files()).encode("utf-8", "surrogateescape")).hexdigest()


def hash_content(picture: bytes, captions: Iterable[str]) -> int:
    """64 bits that stand for a stored picture and its captions, wherever they are stored."""
    digest = hashlib.blake2b(len(picture).to_bytes(8, "little"), digest_size=8)
    digest.update(picture)
    for caption in captions:
        digest.update(caption.encode("utf-8", "surrogatepass") + b"\0")
    return int.from_bytes(digest.digest(), "little")
