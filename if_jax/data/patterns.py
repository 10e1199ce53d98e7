"""What a source's name stands for: `~`, `{00000..00041}`, `{a,b}`, `*`, `**`, `?`, `[01]`, `a::b`, `NAME@split`."""

from __future__ import annotations

import fnmatch
import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from if_jax.data.reading import as_path, file_status, list_folder
from if_jax.data.remote import DataPath, RemotePath, RemoteSettings, is_address

_NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LIST = re.compile(r"\{([^{}]*,[^{}]*)\}")
_INDEXES = (".index", ".index.npz")  # beside the data, of this version and of earlier ones
_SPLIT = re.compile(r"(.*[^/@])@([\w.-]+)", re.DOTALL)  # what is behind an @ that stands within a path is no split


class SourceName(NamedTuple):
    """One file, folder or prepared data set."""

    name: str
    split: str = ""  # "" unless it is named


def expand(source: str, settings: RemoteSettings = RemoteSettings()) -> list[SourceName]:  # noqa: B008 (frozen)
    """Every name a source stands for, in order; patterns sorted.

    What exists under the very name is that, whatever signs are in it.

    Args:
      source: names and patterns, of which those with a scheme (gs://…) are in buckets.
      settings: of the buckets.

    Raises:
      FileNotFoundError: a pattern matches nothing.
      ValueError: the source is empty, or in a bucket that cannot be read.
    """
    if not source.strip():
        raise ValueError(f"data source {source!r} is empty: give a folder, tar files, or scenes")
    if exists(source, settings):
        return [SourceName(expand_home(source))]
    return [name for part in source.split("::") for name in _expand_part(part, settings)]


def expand_home(path: str) -> str:
    """A path with the home folder for a `~` at its start."""
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:  # no such user, no home
        return path


def exists(path: str, settings: RemoteSettings = RemoteSettings()) -> bool:  # noqa: B008 (frozen)
    """Whether something has this very name."""
    try:
        return file_status(as_path(expand_home(path), settings)) is not None
    except ValueError:
        if is_address(path):
            raise
        return False  # a NUL in it


def matches_files(pattern: str) -> bool:
    """Whether files have the names that a pattern stands for."""
    return any(exists(name) or _glob(as_path(name)) for name in _braces(expand_home(pattern)))


def _expand_part(part: str, settings: RemoteSettings) -> list[SourceName]:
    split = None if exists(part, settings) else _SPLIT.fullmatch(part)
    if split and not exists(split[1], settings) and Path(split[2]).suffix in (".tar", ".parquet"):
        split = None  # me@lab.tar
    base, behind = (split[1], split[2]) if split else (part, "")
    names, filled = [], _braces(expand_home(base))
    if len(filled) > 1:
        _list_parents(filled, settings)
    for name in filled:
        if exists(name, settings) or not glob.has_magic(name):
            names.append(name)
            continue
        matches = _glob(as_path(name, settings))
        if not matches:
            raise FileNotFoundError(f"data source {part!r} does not exist: nothing matches {name!r}, check the pattern")
        names += matches
    return [SourceName(name, behind) for name in names]


def _list_parents(names: list[str], settings: RemoteSettings) -> None:
    """Ask a bucket for folders once, rather than for each of the names in them."""
    paths = [as_path(name, settings) for name in names if not glob.has_magic(name)]
    for parent in {path.parent for path in paths if isinstance(path, RemotePath)}:
        _entries(parent)


def _entries(folder: DataPath) -> Iterator[tuple[DataPath, bool]]:
    """What a folder holds, and whether each is a folder; nothing where it is none."""
    if not isinstance(folder, RemotePath) and not folder.is_dir():
        return iter(())
    try:
        entries = list_folder(folder)
    except (FileNotFoundError, NotADirectoryError):
        if not isinstance(folder, RemotePath):
            raise
        return iter(())
    return iter([(folder / entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries])


def _braces(pattern: str) -> list[str]:
    numbers, words = _NUMBERS.search(pattern), _LIST.search(pattern)
    if numbers:
        first, last, width = int(numbers[1]), int(numbers[2]), len(numbers[1])
        span, choices = numbers.span(), [str(i).zfill(width) for i in range(first, last + 1)]
    elif words:
        span, choices = words.span(), words[1].split(",")
    else:
        return [pattern]
    filled = (pattern[: span[0]] + choice + pattern[span[1] :] for choice in choices)
    return [name for partly in filled for name in _braces(partly)]


def _glob(path: DataPath) -> list[str]:
    """What a pattern matches, sorted; Python's own would take a folder that cannot be listed for an empty one."""
    if isinstance(path, RemotePath):
        scheme, bucket, *parts = re.split(r"(?<!/)/+", path.address)
        start: DataPath = RemotePath(f"{scheme}//{bucket}", path.settings)
    else:
        start, parts = (Path(path.anchor), path.parts[1:]) if path.anchor else (Path(), path.parts)
    return sorted({str(match) for match in _matches(start, tuple(parts)) if not match.name.endswith(_INDEXES)})


def _matches(folder: DataPath, parts: tuple[str, ...]) -> Iterator[DataPath]:
    if not parts:
        yield folder
        return
    first, *rest = parts
    if not glob.has_magic(first):
        if (rest and isinstance(folder, RemotePath)) or file_status(folder / first) is not None:
            yield from _matches(folder / first, tuple(rest))
        return
    if first == "**":
        yield from _matches(folder, tuple(rest))
    for path, is_folder in _entries(folder):
        if path.name.startswith(".") and not first.startswith("."):
            continue
        if first == "**":
            if is_folder:
                yield from _matches(path, parts)
        elif fnmatch.fnmatchcase(path.name, first):
            yield from _matches(path, tuple(rest))
