"""Tensor files (safetensors) and folders that appear whole or not at all.

A safetensors file is eight bytes (little-endian length of the header), a JSON header naming the type, shape and byte
range of every tensor, then the raw tensors. The writer here needs one tensor in memory at a time, so a net spread over
many devices is saved without gathering it on the host.
Source: the format description in the safetensors README.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_RELEASE_MARKS = ("cascade.json", "model_index.json")


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, np.ndarray]],
    dtype_of: Callable[[str], str],
    metadata: Mapping[str, str],
) -> None:
    """Write one safetensors file, a tensor at a time.

    shapes: every tensor's name and shape, in the order in which `tensors` yields them. dtype_of(name): a key of DTYPES.
    Raises ValueError when a value does not fit the type, or when `tensors` and `shapes` disagree.
    """
    header, end = {"__metadata__": dict(metadata)}, 0
    for name, shape in shapes.items():
        start, end = end, end + int(np.prod(shape, dtype=np.int64)) * _numpy_dtype(dtype_of(name)).itemsize
        header[name] = {"dtype": DTYPES[dtype_of(name)], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the first tensor starts on a multiple of eight bytes
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        expected = iter(shapes.items())
        for name, tensor in tensors:
            if (name, tensor.shape) != next(expected, None):
                raise ValueError(f"{path.name}: tensor {name} {tensor.shape} came out of order while it was written")
            file.write(_cast(name, tensor, dtype_of(name)).tobytes())
        if next(expected, None) is not None:
            raise ValueError(f"{path.name}: fewer tensors than announced were written")


def read_tensors(folder: Path, stem: str) -> tuple[Callable[[str], np.ndarray], list[str], dict[str, str]]:
    """Open the weights of a folder: (get one tensor by name, all names, the file's own metadata).

    Finds `stem.safetensors`, the sharded `stem.safetensors.index.json` or the half precision `stem.fp16.safetensors`.
    Raises FileNotFoundError naming the file that is missing, ValueError for a file that is no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    files, names, metadata = {}, {}, {}
    for path in weight_files(folder, stem):
        try:
            files[path] = safe_open(path, framework="numpy")
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error}); copy or export it again") from None
        names.update(dict.fromkeys(files[path].keys(), path))
        metadata.update(files[path].metadata() or {})
    return (lambda name: files[names[name]].get_tensor(name)), list(names), metadata


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors files that hold a model's weights; raises FileNotFoundError for the first that is missing."""
    index = folder / f"{stem}.safetensors.index.json"
    if index.exists():
        shards = sorted(set(read_json(index)["weight_map"].values()))
        paths = [folder / shard for shard in shards]
    else:
        whole, half = folder / f"{stem}.safetensors", folder / f"{stem}.fp16.safetensors"
        paths = [half if half.exists() and not whole.exists() else whole]
    for path in paths:
        require_file(path)
    return paths


def read_json(path: Path) -> dict:
    """A JSON object from a file; one clear line where it is missing or is no JSON object."""
    require_file(path)
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); copy or export the release again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a JSON {type(content).__name__}, expected an object")
    return content


def write_json(path: Path, content: Mapping) -> None:
    """Write a JSON object with sorted keys, the way model folders usually hold it."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def require_file(path: Path) -> None:
    """Raise FileNotFoundError, naming the file, unless it exists."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the release lacks this file; copy the folder again or export it anew")


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def appears_whole(destination: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder beside `destination`, renamed onto it on success and removed, with its new parents, on failure.

    Raises ValueError where the destination exists and `overwrite` is false, or where it is no release and would be
    lost; OSError with one clear line where the disk is full.
    """
    destination = Path(os.path.abspath(destination))
    _check_destination(destination, overwrite)
    new_parents = [parent for parent in destination.parents if not parent.exists()]  # nearest first
    beside = destination.with_name(f".{destination.name}.{os.getpid()}.partial")
    try:
        beside.mkdir(parents=True)
        yield beside
        _rename_over(beside, destination)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        for parent in new_parents:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            line = "no space left, so nothing was written; free some or choose another disk"
            raise OSError(errno.ENOSPC, line, str(destination)) from None
        raise


def _check_destination(destination: Path, overwrite: bool) -> None:
    if not destination.exists():
        return
    if not overwrite:
        raise ValueError(f"{destination} exists already: choose another folder or ask to overwrite it")
    is_release = destination.is_dir() and any((destination / mark).exists() for mark in _RELEASE_MARKS)
    is_empty = destination.is_dir() and not any(destination.iterdir())
    if not (is_release or is_empty):
        raise ValueError(f"{destination} is not a release, so it is not overwritten: choose another folder")


def _rename_over(beside: Path, destination: Path) -> None:
    """Rename onto the destination; the release that was there is set aside first, so one of the two always exists."""
    if not destination.exists():
        beside.rename(destination)
        return
    aside = beside.with_suffix(".old")
    destination.rename(aside)
    try:
        beside.rename(destination)
    except OSError:
        aside.rename(destination)
        raise
    shutil.rmtree(aside)


def _cast(name: str, tensor: np.ndarray, dtype: str) -> np.ndarray:
    if not np.isfinite(tensor.astype(np.float32, copy=False)).all():
        raise ValueError(f"{name} holds values that are not finite: export a run that has not diverged")
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(tensor).astype(_numpy_dtype(dtype))
    if dtype == "float16" and not np.isfinite(cast).all():
        largest = float(np.abs(tensor).max())
        raise ValueError(f"{name}: largest value {largest:.3g} does not fit float16; export in bfloat16 or float32")
    return cast


def _numpy_dtype(dtype: str) -> np.dtype:
    import jax.numpy as jnp  # numpy itself has no bfloat16

    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
    return np.dtype(getattr(jnp, dtype))
