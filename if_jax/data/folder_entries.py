"""What a folder of pictures lists: each picture with its caption's place, and everything else with why it is not read.

Captions stand in a metadata file as Hugging Face's datasets take it (`metadata.jsonl`, `.csv` or `.parquet`, in the
folder or in a part of it), or in a `.txt` or img2dataset's `.json` beside each picture.
"""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from if_jax.data.preprocessing import SUFFIXES
from if_jax.data.reading import is_transient, list_folder, read_file, retried
from if_jax.data.remote import DataPath, RemoteEntry, RemotePath

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "title", "description")
INDEX = ".if_jax_index"
_OURS = frozenset((INDEX, f"{INDEX}.npz", ".if_jax_rows"))  # beside the pictures, of this version and of earlier ones
_OTHER = "not a kind of picture read here"


class Entry(NamedTuple):
    """One image with its captions (read, or the file they are in), or with the problem known before opening it."""

    name: str  # as the user knows it, relative to the folder
    path: DataPath
    captions: tuple[str, ...] | DataPath
    metadata: Mapping[str, Any] | DataPath
    problem: str = ""


class Listing(NamedTuple):
    """A folder's own files and folders by name, links followed."""

    path: DataPath
    files: list[str]
    folders: list[str]
    problem: str = ""  # why there are none


def list_entries(source: DataPath) -> list[Entry]:
    """Every picture below a folder with its captions, and every other file with its problem, sorted by name.

    Raises:
      OSError: a folder cannot be listed for a reason that may pass.
    """
    entries: list[Entry] = []
    listed: dict[DataPath, set[DataPath]] = {}  # folders with a metadata file: the pictures it lists
    for listing in walk_folders(source):
        metadata = next((name for name in METADATA if name in listing.files), None)
        if metadata:
            rows = _by_metadata(source, listing.path, metadata)
            listed[listing.path] = {row.path for row in rows}
            entries += rows
        above = next((folder for folder in (listing.path, *listing.path.parents) if folder in listed), None)
        if above is None:
            entries += _by_files(source, listing)
            continue
        for name in listing.files:
            path = listing.path / name
            if path not in listed[above] and name != metadata:
                problem = f"not listed in {metadata or 'the metadata above'}" if is_picture(name) else _OTHER
                entries.append(Entry(_name(source, path), path, (), {}, problem))
    lines = bool(listed)  # lines of a metadata file stay in their order
    return entries if lines else sorted(entries, key=lambda entry: (entry.name, entry.path))


def is_picture(name: str) -> bool:
    """Whether a file is called like a picture."""
    return Path(name).suffix.lower() in SUFFIXES


def captions_in(fields: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The captions of a row of metadata: one, or a list of them; None where no column of captions is there."""
    for column in CAPTION_COLUMNS:
        value = fields.get(column)
        if isinstance(value, str):
            return (value,)
        if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
            return tuple(value)
    return None


def walk_folders(source: DataPath) -> Iterator[Listing]:
    """Folder after folder, parents first, each once however often it is linked."""
    seen: set[object] = set()
    waiting = [source]
    while waiting:
        path = waiting.pop(0)
        if (identity := _identity(path)) in seen:
            yield Listing(path, [], [], "link to a folder that is read already")
            continue
        seen.add(identity)
        try:
            entries = list_folder(path)
        except OSError as error:
            if is_transient(error) or path == source:
                raise
            yield Listing(path, [], [], "folder cannot be opened")
            continue
        entries = [entry for entry in entries if entry.name not in _OURS]
        folders = [entry.name for entry in entries if _is_folder(entry)]
        files = [entry.name for entry in entries if entry.name not in set(folders)]
        yield Listing(path, files, folders)
        waiting[:0] = [path / name for name in folders]


def _identity(path: DataPath) -> object:
    """The same for two paths that lead to one folder."""
    if isinstance(path, RemotePath):
        return path
    status = path.stat()
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str] | RemoteEntry) -> bool:
    try:
        return retried(entry.is_dir, entry.path)
    except OSError as error:  # a link to itself
        if is_transient(error):
            raise
        return False


def _by_metadata(source: DataPath, folder: DataPath, name: str) -> list[Entry]:
    entries: list[Entry] = []
    times: dict[str, int] = defaultdict(int)
    rows = list(_rows(folder / name))
    columns = {column for _, fields in rows if isinstance(fields, dict) for column in fields}
    mute = "" if columns & set(CAPTION_COLUMNS) else f"no caption: {name} has no column {' or '.join(CAPTION_COLUMNS)}"
    for place, fields in rows:
        file = fields.get("file_name") if isinstance(fields, dict) else None
        if not isinstance(file, str) or not file or "\0" in file:
            where = _name(source, folder / name)
            entries.append(Entry(f"{where} {place}", folder / name, (), {}, "line is not {file_name, text}"))
            continue
        path = _listed_path(folder, file)
        times[file] += 1  # one picture may have several captions, in lines of their own
        key = file if folder == source else posixpath.join(_name(source, folder), file)
        key = key if times[file] == 1 else f"{key} ({times[file]})"
        problem = mute if path else "outside the folder"
        entries.append(Entry(_printable(key), path or folder, captions_in(fields) or ("",), fields, problem))
    return entries


def _listed_path(folder: DataPath, file: str) -> DataPath | None:
    """Where a file is that a metadata file names; None outside its folder. Links are followed: they were set there."""
    if "\\" in file and not (folder / file).exists():  # written on Windows
        file = file.replace("\\", "/")
    if isinstance(folder, RemotePath):
        inside = posixpath.normpath(file)
        return None if inside.startswith("/") or inside.split("/")[0] == ".." else folder / inside
    path = os.path.normpath(os.path.join(folder.absolute(), file))
    inside = os.path.relpath(path, folder.absolute())
    return None if inside.split(os.sep)[0] == ".." else folder / inside


def _rows(path: DataPath) -> Iterable[tuple[str, Any]]:
    """The rows of a metadata file with their place in words; what is no row is None."""
    if path.suffix == ".parquet":
        from if_jax.data.arrow import read_rows

        return ((f"row {number}", row) for number, row in enumerate(read_rows(path), start=1))
    if path.suffix == ".csv":
        text = io.StringIO(read_file(path).decode("utf-8-sig", "replace"), newline="")
        reader = csv.DictReader(text)
        return ((f"line {reader.line_num}", row) for row in reader)
    lines = enumerate(read_file(path).removeprefix(b"\xef\xbb\xbf").splitlines(), start=1)
    return ((f"line {number}", _parsed(line)) for number, line in lines if line.strip())


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _by_files(source: DataPath, listing: Listing) -> list[Entry]:
    if listing.problem:
        return [Entry(_name(source, listing.path), listing.path, (), {}, listing.problem)]
    pictures = {Path(name).stem for name in listing.files if is_picture(name)}
    beside = {suffix: _beside(listing.files, suffix) for suffix in (".txt", ".caption", ".json")}
    entries = []
    for name in [*listing.files, *filter(is_picture, listing.folders)]:
        path = listing.path / name
        stem, suffix = path.stem, path.suffix.lower()
        if suffix in beside and stem in pictures and beside[suffix].get(stem) == name:
            continue
        problem = "" if is_picture(name) else "no picture beside this caption" if suffix == ".txt" else _OTHER
        metadata = beside[".json"].get(stem)
        text = beside[".txt"].get(stem) or beside[".caption"].get(stem) or f"{stem}.txt"
        captions = listing.path / text
        known = listing.path / metadata if metadata else {}
        entries.append(Entry(_name(source, path), path, captions, known, problem))
    return entries


def _beside(files: list[str], suffix: str) -> dict[str, str]:
    """Stem -> name of the files with a suffix, in whatever case; the plain name first."""
    named = sorted((name for name in files if name.lower().endswith(suffix)), reverse=True)
    return {Path(name).stem: name for name in named}


def _name(source: DataPath, path: DataPath) -> str:
    return _printable(os.path.relpath(str(path), str(source)))


def _printable(name: str) -> str:
    """A name that any terminal and file can hold; bytes that are no UTF-8 become "?"."""
    return name.encode("utf-8", "replace").decode("utf-8")
