"""Checksums of a finished checkpoint, kept inside it: a flipped byte would otherwise load without a word."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from etils import epath

SEAL = "sha256.json"
_CHUNK = 1 << 22


def seal(folder: epath.Path) -> None:
    """Writes size and SHA-256 of every file of a checkpoint to its `sha256.json`, beside and then in place."""
    content = {name: list(pair) for name, pair in sorted(_measure(folder, _files(folder)).items())}
    beside = folder / (SEAL + ".partial")
    beside.write_text(json.dumps(content, indent=1))
    beside.rename(folder / SEAL)


def damage(folder: epath.Path) -> str | None:
    """What is wrong with a sealed checkpoint, in words; None where nothing is, or where it was never sealed.

    A process that is killed right after writing leaves a checkpoint without a seal: complete, but not checkable.
    """
    if not (folder / SEAL).exists():
        return None
    try:
        wanted = {name: (int(size), str(digest)) for name, (size, digest) in json.loads(_text(folder / SEAL)).items()}
    except (ValueError, TypeError, AttributeError):
        return f"{SEAL} is not readable"
    if missing := sorted(wanted.keys() - set(_files(folder))):
        return f"{missing[0]} is missing"
    for name, (size, digest) in sorted(_measure(folder, wanted).items()):
        if size != wanted[name][0]:
            return f"{name} has {size} bytes where {wanted[name][0]} were written"
        if digest != wanted[name][1]:
            return f"{name} is not what was written (SHA-256 differs)"
    return None


def _text(path: epath.Path) -> str:
    return path.read_bytes().decode("utf-8")


def _files(folder: epath.Path) -> list[str]:
    return [name for name in _walk(folder, "") if not name.startswith(SEAL)]


def _walk(folder: epath.Path, prefix: str) -> Iterator[str]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _walk(path, f"{prefix}{path.name}/")
        else:
            yield prefix + path.name


def _measure(folder: epath.Path, names: list[str] | dict) -> dict[str, tuple[int, str]]:
    """Bytes and SHA-256 of files; several at a time, since hashing leaves the interpreter's lock free."""

    def one(name: str) -> tuple[int, str]:
        digest, size = hashlib.sha256(), 0
        with (folder / name).open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
        return size, digest.hexdigest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))
