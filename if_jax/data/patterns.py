"""What a source's name stands for: `~`, `{00000..00041}`, `{a,b}`, `*`, `**`, `?`, `[01]`, `a::b`, `NAME@split`."""

from __future__ import annotations

import fnmatch
import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from if_jax.data.reading import file_status, list_folder

_NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LIST = re.compile(r"\{([^{}]*,[^{}]*)\}")
_SPLIT = re.compile(r"(.*[^/@])@([\w.-]+)", re.DOTALL)  # what is behind an @ that stands within a path is no split


class SourceName(NamedTuple):
    """One file, folder or prepared data set."""

    name: str
    split: str = ""  # "" unless it is named


def expand(source: str) -> list[SourceName]:
    """Every name a source stands for, in order; patterns sorted.

    What exists under the very name is that, whatever signs are in it.

    Raises:
      FileNotFoundError: a pattern matches nothing.
      ValueError: the source is empty, or in a bucket.
    """
    if not source.strip():
        raise ValueError(f"data source {source!r} is empty: give a folder, tar files, or scenes")
    if re.match(r"[A-Za-z][\w+.-]*://", source):
        raise ValueError(f"data source {source!r} is not on a disk: copy it to one, or mount it, and name that folder")
    if exists(source):
        return [SourceName(expand_home(source))]
    return [name for part in source.split("::") for name in _expand_part(part)]


def expand_home(path: str) -> str:
    """A path with the home folder for a `~` at its start."""
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:  # no such user, no home
        return path


def exists(path: str) -> bool:
    """Whether something has this very name."""
    try:
        return file_status(Path(expand_home(path))) is not None
    except ValueError:  # a NUL in it
        return False


def matches_files(pattern: str) -> bool:
    """Whether files have the names that a pattern stands for."""
    return any(exists(name) or _glob(name) for name in _braces(expand_home(pattern)))


def _expand_part(part: str) -> list[SourceName]:
    split = None if exists(part) else _SPLIT.fullmatch(part)
    if split and not exists(split[1]) and Path(split[2]).suffix in (".tar", ".parquet"):
        split = None  # me@lab.tar
    base, behind = (split[1], split[2]) if split else (part, "")
    names = []
    for name in _braces(expand_home(base)):
        if exists(name) or not glob.has_magic(name):
            names.append(name)
            continue
        matches = _glob(name)
        if not matches:
            raise FileNotFoundError(f"data source {part!r} does not exist: nothing matches {name!r}, check the pattern")
        names += matches
    return [SourceName(name, behind) for name in names]


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


def _glob(pattern: str) -> list[str]:
    """What a pattern matches, sorted; Python's own would take a folder that cannot be listed for an empty one."""
    path = Path(pattern)
    start, parts = (Path(path.anchor), path.parts[1:]) if path.anchor else (Path(), path.parts)
    return sorted({str(match) for match in _matches(start, parts) if not match.name.endswith(".index.npz")})


def _matches(folder: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    if not parts:
        yield folder
        return
    first, *rest = parts
    if not glob.has_magic(first):
        if exists(str(folder / first)):
            yield from _matches(folder / first, tuple(rest))
        return
    if first == "**":
        yield from _matches(folder, tuple(rest))
    for entry in list_folder(folder) if folder.is_dir() else ():
        if entry.name.startswith(".") and not first.startswith("."):
            continue
        if first == "**":
            if entry.is_dir(follow_symlinks=False):
                yield from _matches(folder / entry.name, parts)
        elif fnmatch.fnmatchcase(entry.name, first):
            yield from _matches(folder / entry.name, tuple(rest))
