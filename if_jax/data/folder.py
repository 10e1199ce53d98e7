"""A folder of images with captions as it is, where anything may be wrong with any file."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from if_jax.data.folder_entries import INDEX, METADATA, Entry, captions_in, list_entries
from if_jax.data.preprocessing import UnusableRecord, read_caption
from if_jax.data.reading import file_status, in_flight, is_transient, read_file, read_ranges, retried
from if_jax.data.records import Record
from if_jax.data.remote import DataPath, RemotePath

_LARGEST = 2**30  # bytes of a picture file: more is no picture one trains on
_LARGEST_TEXT = 2**20


class Folder:
    """A folder with a metadata file (rows with file_name and text), or else with a .txt beside each image below it."""

    kind = "folder"

    def __init__(self, path: DataPath) -> None:
        self.path, self.name = path, str(path)
        self._entries = list_entries(path)
        if not self._entries:
            raise ValueError(
                f"{str(path)!r} lists no image: add {METADATA[0]} (file_name, text), or images with .txt files"
            )

    def fingerprint(self) -> str:
        """A hash of every file's name, size and time."""
        known = hashlib.sha256()
        for entry in self._entries:
            stamps: list[Any] = [_stamp(entry.path), entry.problem]
            for part in (entry.captions, entry.metadata):
                stamps.append(_stamp(part) if isinstance(part, Path | RemotePath) else part)
            known.update(repr((entry.name, stamps)).encode("utf-8", "surrogatepass"))
        return known.hexdigest()

    def files(self) -> list[tuple[str, int]]:
        """Names and sizes of the images, and of what holds their captions."""
        sizes = []
        for entry in self._entries:
            stamp = _stamp(entry.path)
            sizes.append((entry.name, stamp[0] if stamp else -1))
            for part, path in (("caption", entry.captions), ("metadata", entry.metadata)):
                if isinstance(path, Path | RemotePath) and (stamp := _stamp(path)):
                    sizes.append((f"{entry.name}: {part}", stamp[0]))
        lines = ((name, _stamp(self.path / name)) for name in METADATA)
        return sizes + [(name, stamp[0]) for name, stamp in lines if stamp]

    def index_file(self) -> DataPath:
        """Within the folder."""
        return self.path / INDEX

    def scan(self) -> Iterator[tuple[str, tuple[int, ...], Record | UnusableRecord]]:
        """Every entry in order: name, row, and the record or why it is none."""
        records = in_flight(_try, self._entries, isinstance(self.path, RemotePath))
        for row, (entry, record) in enumerate(zip(self._entries, records, strict=True)):
            yield entry.name, (row,), record

    def read(self, key: str, place: Sequence[int]) -> Record:
        """The record of a row; ValueError where it cannot be read any more."""
        try:
            return _read(self._entries[int(place[0])])
        except UnusableRecord as flaw:
            raise ValueError(f"{self.name}: {key} cannot be read any more ({flaw})") from None


def _try(entry: Entry) -> Record | UnusableRecord:
    try:
        return _read(entry)
    except UnusableRecord as flaw:
        return flaw


def _read(entry: Entry) -> Record:
    if entry.problem:
        raise UnusableRecord(entry.problem)
    picture = _bytes(entry.path, _LARGEST, ("missing file", "not a file", "file of more than a gigabyte"))
    metadata = _metadata(entry.metadata)
    return Record(entry.name, picture, tuple(map(read_caption, _captions(entry, metadata))), metadata)


def _captions(entry: Entry, metadata: Mapping[str, Any]) -> list[bytes]:
    if isinstance(entry.captions, Path | RemotePath):
        try:
            return [_bytes(entry.captions, _LARGEST_TEXT, ("", "no caption", "caption of more than a megabyte"))]
        except UnusableRecord as flaw:
            texts = captions_in(metadata)  # img2dataset writes the caption there as well
            if str(flaw) or not texts:
                raise UnusableRecord(str(flaw) or "no caption") from None
    else:
        texts = entry.captions
    return [text.encode("utf-8", "replace") for text in texts]


def _metadata(known: Mapping[str, Any] | DataPath) -> Mapping[str, Any]:
    if not isinstance(known, Path | RemotePath):
        return known
    try:
        content = json.loads(_bytes(known, _LARGEST_TEXT, ("", "", "")))
    except (UnusableRecord, ValueError, RecursionError):
        return {}  # the caption may still be there
    return content if isinstance(content, dict) else {}


def _bytes(path: DataPath, largest: int, reasons: tuple[str, str, str]) -> bytes:
    """A regular file's bytes: a pipe or device is never opened, it might not end."""
    missing, other, large = reasons
    try:
        if isinstance(path, RemotePath):  # one request, not two
            (content,) = read_ranges(path, [(0, largest + 1)])
            if len(content) > largest:
                raise UnusableRecord(large)
            return content
        status = retried(path.stat, path)
        if not stat.S_ISREG(status.st_mode):
            raise UnusableRecord(other)
        if status.st_size > largest:
            raise UnusableRecord(large)
        return read_file(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UnusableRecord(missing) from None
    except OSError as error:
        if is_transient(error):
            raise
        raise UnusableRecord("file cannot be opened") from None  # no permission, a link to itself


def _stamp(path: DataPath) -> tuple[int, int | str] | None:
    status = file_status(path)
    return None if status is None else (status.st_size, status.st_mtime_ns)
