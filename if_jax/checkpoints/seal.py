"""Whether a checkpoint is what was written: checksums inside it, since a flipped byte would load without a word."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tensorstore
from etils import epath

from if_jax.checkpoints.files import atomic_file

SEAL = "sha256.json"
METADATA = "_CHECKPOINT_METADATA"  # Orbax's, with the run's own in `custom_metadata`
_ALWAYS = (METADATA, "state/_METADATA", "state/_sharding")  # without them nothing can be read
_CHUNK = 1 << 22


def seal(folder: epath.Path) -> None:
    """Writes size and SHA-256 of every file of a checkpoint to its `sha256.json`, whole or not at all."""
    content = {name: list(pair) for name, pair in sorted(_measure(folder, _files(folder)).items())}
    with atomic_file(folder / SEAL) as beside:
        beside.write_text(json.dumps(content, indent=1))


def damage(folder: epath.Path) -> str | None:
    """Compares a checkpoint with its seal.

    A process that is killed right after writing leaves a checkpoint without a seal: it is read through instead, which
    tells what is missing or cut off, though not a flipped byte.

    Args:
      folder: the checkpoint.

    Returns:
      What is wrong with it, in words; None for a sound one.

    Raises:
      OSError: it may not, or cannot, be read.
    """
    if not folder.is_dir():
        return "it is not a folder"
    sealed = (folder / SEAL).exists()
    return (_broken_seal(folder) if sealed else None) or _no_json(folder) or (None if sealed else _cut_off(folder))


def _broken_seal(folder: epath.Path) -> str | None:
    try:
        wanted = {name: (int(size), str(digest)) for name, (size, digest) in json.loads(_text(folder / SEAL)).items()}
    except (ValueError, TypeError, AttributeError, IsADirectoryError):
        return f"{SEAL} is not readable"
    if missing := sorted(wanted.keys() - set(_files(folder))):
        return f"{missing[0]} is missing"
    try:
        measured = _measure(folder, wanted)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP):  # links that lead nowhere
            raise
        return f"{Path(error.filename).name} leads nowhere"
    for name, (size, digest) in sorted(measured.items()):
        if size != wanted[name][0]:
            return f"{name} has {size} bytes where {wanted[name][0]} were written"
        if digest != wanted[name][1]:
            return f"{name} is not what was written (SHA-256 differs)"
    return None


def _no_json(folder: epath.Path) -> str | None:
    for name in _ALWAYS:
        try:
            readable = isinstance(json.loads(_text(folder / name)), dict)
        except (FileNotFoundError, NotADirectoryError):
            return f"{name} is missing"
        except (ValueError, IsADirectoryError):
            readable = False
        if not readable:
            return f"{name} is not readable"
    return None


def _cut_off(folder: epath.Path) -> str | None:
    """Reads every stored value once, a chunk at a time."""
    path = f"{folder}/state/"
    base = path if "://" in path else {"driver": "file", "path": path}
    try:
        store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
        keys = store.list().result()
        absent = [key for key in keys if not store.read(key).result().value]  # empty where its file is gone
    except Exception as error:  # TensorStore raises whatever its status says
        if "PERMISSION_DENIED" in str(error):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path) from None
        return f"its arrays cannot be read ({' '.join(str(error).split())[:160]}…)"
    if absent:
        return f"its arrays cannot be read ({absent[0].decode()} is missing)"
    return None if keys else "it holds no arrays"


def _text(path: epath.Path) -> str:
    return path.read_bytes().decode("utf-8")


def _files(folder: epath.Path) -> list[str]:
    return [name for name in _walk(folder, "") if SEAL not in name]  # nor a half-written one


def _walk(folder: epath.Path, prefix: str) -> Iterator[str]:
    for path in folder.iterdir():
        if path.is_dir() and not os.path.islink(path):  # a link could lead around in a circle
            yield from _walk(path, f"{prefix}{path.name}/")
        else:
            yield prefix + path.name


def _measure(folder: epath.Path, names: list[str] | dict) -> dict[str, tuple[int, str]]:
    """Bytes and SHA-256 of files; several at a time, since hashing leaves the interpreter's lock free."""

    def measure(name: str) -> tuple[int, str]:
        digest, size = hashlib.sha256(), 0
        with (folder / name).open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
        return size, digest.hexdigest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(measure, names), strict=True))
