"""A folder of images with captions as it is, where anything may be wrong with any file."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from if_jax.data.index import Record
from if_jax.data.preprocessing import SUFFIXES, UnusableRecord, read_caption

METADATA = "metadata.jsonl"
INDEX = ".if_jax_index.npz"
_LARGEST = 2**30  # bytes of a picture file: more is no picture one trains on
_LARGEST_TEXT = 2**20


class Entry(NamedTuple):
    """One image with its caption (read, or the file it is in), or with the problem found before opening it."""

    name: str  # as the user knows it, relative to the folder
    path: Path
    caption: str | Path
    metadata: dict[str, Any]
    problem: str = ""


class Folder:
    """A folder with metadata.jsonl (lines with file_name and text), or else with a .txt beside each image below it."""

    kind = "folder"

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        self._entries = _by_metadata(path) if (path / METADATA).is_file() else _by_text_files(path)
        if not self._entries:
            raise ValueError(
                f"{str(path)!r} lists no image: add {METADATA} (file_name, text), or images with .txt files"
            )

    def fingerprint(self) -> str:
        """A hash of every file's name, size and time."""
        known = hashlib.sha256()
        for entry in self._entries:
            text = entry.caption
            known.update(repr((entry.name, _stamp(entry.path), entry.problem)).encode("utf-8", "surrogateescape"))
            known.update(repr(_stamp(text) if isinstance(text, Path) else text).encode("utf-8", "surrogatepass"))
        return known.hexdigest()

    def files(self) -> list[tuple[str, int]]:
        """Names and sizes of the images, and of what holds their captions."""
        sizes = []
        for entry in self._entries:
            text, stamp = entry.caption, _stamp(entry.path)
            sizes.append((entry.name, stamp[0] if stamp else -1))
            if isinstance(text, Path) and (stamp := _stamp(text)):
                sizes.append((f"{entry.name}: caption", stamp[0]))
        lines = _stamp(self.path / METADATA)
        return sizes + ([(METADATA, lines[0])] if lines else [])

    def index_file(self) -> Path:
        """Within the folder."""
        return self.path / INDEX

    def scan(self) -> Iterator[tuple[str, tuple[int, ...], Record | UnusableRecord]]:
        """Every entry in order: name, row, and the record or why it is none."""
        for row, entry in enumerate(self._entries):
            try:
                yield entry.name, (row,), self._read(row)
            except UnusableRecord as flaw:
                yield entry.name, (row,), flaw

    def read(self, key: str, place: Sequence[int]) -> Record:
        """The record of a row; ValueError where it cannot be read any more."""
        try:
            return self._read(int(place[0]))
        except UnusableRecord as flaw:
            raise ValueError(f"{self.name}: {key} cannot be read any more ({flaw})") from None

    def _read(self, row: int) -> Record:
        entry = self._entries[row]
        if entry.problem:
            raise UnusableRecord(entry.problem)
        picture = _bytes(entry.path, _LARGEST, ("missing file", "not a file", "file of more than a gigabyte"))
        text = entry.caption
        if isinstance(text, Path):
            text = _bytes(text, _LARGEST_TEXT, ("no caption", "no caption", "caption of more than a megabyte"))
        else:
            text = text.encode("utf-8", "replace")
        return Record(entry.name, picture, (read_caption(text),), entry.metadata)


def _bytes(path: Path, largest: int, reasons: tuple[str, str, str]) -> bytes:
    """A regular file's bytes: a pipe or device is never opened, it might not end."""
    missing, other, large = reasons
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UnusableRecord(other)
        if status.st_size > largest:
            raise UnusableRecord(large)
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UnusableRecord(missing) from None
    except OSError:  # no permission, a link to itself, a broken disk
        raise UnusableRecord("file cannot be opened") from None


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _by_metadata(source: Path) -> list[Entry]:
    root, entries, times = source.resolve(), [], {}
    for number, line in enumerate((source / METADATA).read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            name, text = fields["file_name"], fields.get("text") or ""
            path = (source / name).resolve()
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
            flaw = "line is not {file_name, text}"
            entries.append(Entry(f"{METADATA} line {number}", source / METADATA, "", {}, flaw))
            continue
        problem = "" if path.is_relative_to(root) else "outside the folder"
        times[name] = times.get(name, 0) + 1  # one picture may have several captions, in lines of their own
        key = name if times[name] == 1 else f"{name} ({times[name]})"
        entries.append(Entry(_printable(key), path, text, fields, problem))
    return entries


def _by_text_files(source: Path) -> list[Entry]:
    entries = []
    for parent, folders, files in os.walk(source):
        pictures = {Path(name).stem for name in files if _is_picture(name)}
        for name in [*files, *filter(_is_picture, folders)]:
            path = Path(parent) / name
            if name == INDEX or (path.suffix.lower() == ".txt" and path.stem in pictures):
                continue
            problem = "" if _is_picture(name) else "no picture beside this caption"
            if problem and path.suffix.lower() != ".txt":
                problem = "not a kind of picture read here"
            key = _printable(path.relative_to(source).as_posix())
            entries.append(Entry(key, path, path.with_suffix(".txt"), {}, problem))
    return sorted(entries, key=lambda entry: (entry.name, entry.path))


def _is_picture(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES


def _printable(name: str) -> str:
    """A name that any terminal and file can hold; bytes that are no UTF-8 become "?"."""
    return name.encode("utf-8", "replace").decode("utf-8")
