"""Tensor files, written one tensor at a time: safetensors (whole or in shards) and PyTorch's `.bin`."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp  # for bfloat16, which numpy itself lacks
import numpy as np

from if_jax.checkpoints.files import write_json
from if_jax.checkpoints.tensors import (
    CONTENT_KEY,
    DTYPES,
    BytesWritten,
    Storage,
    TensorSpec,
    import_torch,
    numpy_dtype,
    tensor_bytes,
)


def write_tensors(
    folder: Path,
    stem: str,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str],
    storage: Storage | None = None,
    progress: BytesWritten | None = None,
) -> None:
    """Write safetensors files, a tensor at a time.

    Args:
      folder: where they go.
      stem: as for `read_tensors`.
      specs: shape and precision of every tensor, in the order in which `tensors` yields them.
      tensors: names and values.
      metadata: for the header, to which the SHA-256 of the content is added.
      storage: shards and variant.
      progress: called with the bytes written.

    Raises:
      ValueError: a value does not fit the type, or `tensors` and `specs` disagree.
    """
    storage = storage or Storage()
    shards = _plan(specs, storage.shard_bytes)
    source = iter(tensors)
    names = [storage.file_name(stem, number, len(shards)) for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, {key: specs[key] for key in shard}, source, metadata, progress)
    if next(source, None) is not None:
        raise ValueError(f"{stem}: more tensors than announced were written")
    if len(shards) > 1:
        index = f"{stem}.safetensors.index" + (f".{storage.variant}.json" if storage.variant else ".json")
        total = sum(tensor_bytes(spec) for spec in specs.values())
        listed = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        write_json(folder / index, {"metadata": {"total_size": total}, "weight_map": listed})


def write_bin(
    path: Path,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, np.ndarray]],
    progress: BytesWritten | None = None,
) -> None:
    """Write a PyTorch file of tensors (a flat dict), gathered in a file beside it rather than in memory.

    Args:
      path: the file.
      specs: as for `write_tensors`.
      tensors: names and values.
      progress: called with the bytes written.

    Raises:
      ValueError: as for `write_tensors`, or PyTorch is not installed.
      OSError: the disk has no room for both files.
    """
    torch = import_torch(f"{path.name}: writing .bin files")
    total = sum(tensor_bytes(spec) for spec in specs.values())
    if shutil.disk_usage(path.parent).free < 2 * total:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    scratch, state, end = path.with_suffix(".scratch"), {}, 0
    buffer = np.memmap(scratch, np.uint8, mode="w+", shape=(max(total, 1),))
    for name, (shape, dtype), stored in _in_order(path, specs, iter(tensors)):
        start, end = end, end + len(stored)
        buffer[start:end] = stored
        values = buffer[start:end].view(np.ndarray).view(np.int16 if dtype == "bfloat16" else numpy_dtype(dtype))
        state[name] = torch.from_numpy(values).view(getattr(torch, dtype)).reshape(shape)
        if progress is not None:
            progress(end - start)
    torch.save(state, path)
    scratch.unlink()


def cast(name: str, tensor: np.ndarray, dtype: str) -> np.ndarray:
    """A tensor in the precision it is stored in, contiguous.

    Args:
      name: for messages.
      tensor: the values.
      dtype: a key of DTYPES.

    Raises:
      ValueError: a value is not finite, or does not fit.
    """
    if not np.isfinite(tensor if tensor.dtype != jnp.bfloat16 else tensor.astype(np.float32)).all():
        raise ValueError(f"{name} holds values that are not finite: use weights that have not diverged")
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(tensor).astype(numpy_dtype(dtype), copy=False)
    if dtype == "float16" and tensor.dtype != np.float16 and not np.isfinite(stored).all():
        largest = float(np.abs(tensor).max())
        raise ValueError(f"{name}: largest value {largest:.3g} does not fit float16; store it in bfloat16 or float32")
    return stored


def _plan(specs: Mapping[str, TensorSpec], shard_bytes: int | None) -> list[list[str]]:
    """Names by shard, in order; a tensor larger than a shard gets its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if shard_bytes is not None and shards[-1] and filled + tensor_bytes(spec) > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor_bytes(spec)
    return shards


def write_safetensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    tensors: Iterator[tuple[str, np.ndarray]],
    metadata: Mapping[str, str],
    progress: BytesWritten | None = None,
) -> None:
    """Write one safetensors file, a tensor at a time.

    Args:
      path: the file.
      specs: as for `write_tensors`.
      tensors: names and values, in the order of `specs`; what comes after those is left.
      metadata: for the header, to which the SHA-256 of the content is added.
      progress: called with the bytes written.

    Raises:
      ValueError: a value does not fit the type, or another tensor comes.
    """
    unknown = "0" * 64  # stands in for the hash of what is still to be written
    header: dict[str, Any] = {"__metadata__": {**dict(sorted(metadata.items())), CONTENT_KEY: unknown}}
    end = 0
    for name, spec in specs.items():
        start, end = end, end + tensor_bytes(spec)
        header[name] = {"dtype": DTYPES[spec[1]], "shape": list(spec[0]), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the first tensor starts on a multiple of eight bytes
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, stored in _in_order(path, specs, tensors):
            digest.update(stored.data)
            file.write(stored.data)
            if progress is not None:
                progress(len(stored))
        mark = f'"{CONTENT_KEY}":"'.encode()
        file.seek(8 + text.index(mark) + len(mark))
        file.write(digest.hexdigest().encode())


def _in_order(
    path: Path, specs: Mapping[str, TensorSpec], tensors: Iterator[tuple[str, np.ndarray]]
) -> Iterator[tuple[str, TensorSpec, np.ndarray]]:
    """Name, specification and bytes (uint8) of every tensor as it is stored; ValueError where another one comes."""
    for name, (shape, dtype) in specs.items():
        source, tensor = next(tensors, ("nothing", np.empty(0)))
        if source != name or tuple(tensor.shape) != shape:
            raise ValueError(f"{path.name}: {source} came in place of {name} {shape} while it was written")
        yield name, (shape, dtype), cast(name, tensor, dtype).reshape(-1).view(np.uint8)
