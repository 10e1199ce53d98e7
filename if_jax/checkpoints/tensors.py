"""Tensor files, read and written one tensor at a time: safetensors (whole or in shards) and PyTorch's `.bin`.

A safetensors file is eight bytes (little-endian length of the header), a JSON header naming the type, shape and byte
range of every tensor, then the raw tensors. Tensors are read from memory-mapped files when they are asked for, so a
net of any size is converted, or put on its devices, without a second copy of it in memory.
Source: the format description in the safetensors README.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp  # for bfloat16, which numpy itself lacks
import numpy as np

from if_jax.checkpoints.files import read_json, require_file, write_json

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
CONTENT_KEY = "content_sha256"  # in the metadata of our files: SHA-256 of all bytes behind the header
TensorSpec = tuple[tuple[int, ...], str]  # shape, key of DTYPES
BytesWritten = Callable[[int], object]  # called with the number of bytes written since the last call
_BIN_STEMS = {"model": "pytorch_model"}  # transformers' other name for the same weights in its .bin files


@dataclass(frozen=True, eq=False)
class Lazy:
    """One tensor, known by shape and dtype, its values read when `np.asarray` asks for them."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = self.read()
        return values.astype(dtype, copy=bool(copy)) if dtype is not None else values.copy() if copy else values


@dataclass(frozen=True)
class Storage:
    """How weights are stored: precision (None: as they are), largest file in bytes (None: one file), variant name."""

    dtype: str | None = "float32"
    shard_bytes: int | None = None
    variant: str | None = None  # "fp16" puts it into the file names, as diffusers does

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
        if self.variant is not None and not re.fullmatch(r"[A-Za-z0-9_]+", self.variant):
            raise ValueError(f"variant {self.variant!r} cannot be part of a file name: use letters, such as fp16")
        if self.shard_bytes is not None and self.shard_bytes < 1:
            raise ValueError(f"shard size is {self.shard_bytes} bytes: use 1 or more")

    def file_name(self, stem: str, number: int, count: int) -> str:
        """The name of shard `number` (from 1) of `count`."""
        stem += f".{self.variant}" if self.variant else ""
        return f"{stem}.safetensors" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.safetensors"


def read_tensors(folder: Path, stem: str) -> tuple[dict[str, Lazy], dict[str, str]]:
    """Open the weights of a folder: safetensors or `.bin`, whole or in shards, of any precision.

    Args:
      folder: holds them.
      stem: the name of the file without precision and suffix, as diffusers and transformers call it.

    Returns:
      The tensors by name, and the metadata of the files.

    Raises:
      FileNotFoundError: names the file that is missing.
      ValueError: a file is damaged, disagrees with the index, or (`.bin`) holds anything but tensors.
    """
    tensors: dict[str, Lazy] = {}
    metadata: dict[str, str] = {}
    for path in (paths := weight_files(folder, stem)):
        stored, header = (read_bin(path), {}) if path.suffix == ".bin" else _open_safetensors(path)
        if twice := sorted(tensors.keys() & stored.keys()):
            raise ValueError(f"{path}: holds {twice[0]}, which another shard holds as well; copy the folder again")
        tensors |= stored
        metadata |= header
    if index := _index_file(folder, stem, paths):
        listed = read_json(index)["weight_map"]
        for name, file in listed.items():
            if name not in tensors:
                raise ValueError(f"{folder / file}: lacks {name}, which {index.name} says it holds; copy it again")
        if extra := sorted(tensors.keys() - listed.keys()):
            raise ValueError(f"{index}: does not list {extra[0]}, which its shards hold; copy the folder again")
    return tensors, metadata


def read_bin(path: Path) -> dict[str, Lazy]:
    """Open a PyTorch file of tensors, memory-mapped; whatever would run code while it is opened is refused.

    Args:
      path: the file.

    Returns:
      The tensors by name.

    Raises:
      ValueError: the file is damaged or holds anything but tensors, or PyTorch is not installed.
    """
    torch = _torch(f"{path}: reading .bin files")
    from pickle import UnpicklingError

    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            raise ValueError(f"{path}: no PyTorch file, or older than PyTorch 1.6; copy it, or torch.save it, again")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError:
        raise ValueError(f"{path}: refused, it holds more than tensors and could run code when opened") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        raise ValueError(f"{path}: not a whole PyTorch file ({reason}); copy it again") from None
    pairs = state.items() if isinstance(state, dict) else [(None, None)]
    if not all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in pairs):
        raise ValueError(f"{path}: holds something else than named tensors; give a file of weights alone")
    kinds = {getattr(torch, name): _numpy_dtype(name) for name in DTYPES}
    if other := next((name for name, tensor in state.items() if tensor.dtype not in kinds), None):
        raise ValueError(f"{path}: {other} is of type {state[other].dtype}; if_jax reads {', '.join(DTYPES)}")
    if other := next((name for name, tensor in state.items() if tensor.layout != torch.strided), None):
        raise ValueError(f"{path}: {other} is a sparse tensor; if_jax reads plain ones")

    def lazy(tensor: Any) -> Lazy:
        dtype = kinds[tensor.dtype]
        tensor = tensor.detach()  # some files hold parameters that still ask for gradients
        raw = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
        return Lazy(tuple(tensor.shape), dtype, lambda: raw.numpy().view(dtype))

    return {name: lazy(tensor) for name, tensor in state.items()}


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The files that hold a model's weights, of the best precision there is.

    Args:
      folder: holds them.
      stem: as for `read_tensors`.

    Returns:
      One file, or all shards.

    Raises:
      FileNotFoundError: one is missing.
      ValueError: an index lists none.
    """
    for path in _candidates(folder, stem):
        if path.is_file():
            if path.suffix != ".json":
                return [path]
            listed = read_json(path).get("weight_map")
            if not listed or not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
                raise ValueError(f"{path}: has no weight_map; copy the folder again")
            shards = [folder / name for name in sorted(set(listed.values()))]
            for shard in shards:
                require_file(shard)
            return shards
    require_file(folder / f"{stem}.safetensors")
    raise AssertionError("require_file raises")


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
        _write_safetensors(folder / name, {key: specs[key] for key in shard}, source, metadata, progress)
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
    torch = _torch(f"{path.name}: writing .bin files")
    total = sum(tensor_bytes(spec) for spec in specs.values())
    if shutil.disk_usage(path.parent).free < 2 * total:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    scratch, state, end = path.with_suffix(".scratch"), {}, 0
    buffer = np.memmap(scratch, np.uint8, mode="w+", shape=(max(total, 1),))
    for name, (shape, dtype), stored in _in_order(path, specs, iter(tensors)):
        start, end = end, end + len(stored)
        buffer[start:end] = stored
        values = buffer[start:end].view(np.ndarray).view(np.int16 if dtype == "bfloat16" else _numpy_dtype(dtype))
        state[name] = torch.from_numpy(values).view(getattr(torch, dtype)).reshape(shape)
        if progress is not None:
            progress(end - start)
    torch.save(state, path)
    scratch.unlink()


def tensor_bytes(spec: TensorSpec) -> int:
    """Bytes of one tensor as it is stored."""
    shape, dtype = spec
    return int(np.prod(shape, dtype=np.int64)) * _numpy_dtype(dtype).itemsize


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
        stored = np.ascontiguousarray(tensor).astype(_numpy_dtype(dtype), copy=False)
    if dtype == "float16" and tensor.dtype != np.float16 and not np.isfinite(stored).all():
        largest = float(np.abs(tensor).max())
        raise ValueError(f"{name}: largest value {largest:.3g} does not fit float16; store it in bfloat16 or float32")
    return stored


def _torch(what: str) -> Any:
    try:
        import torch
    except ImportError:
        raise ValueError(f"{what} needs PyTorch: pip install torch, or use safetensors") from None
    return torch


def _candidates(folder: Path, stem: str) -> Iterator[Path]:
    """Where weights may lie, in the order of preference."""
    for name, suffix in ((stem, "safetensors"), (_BIN_STEMS.get(stem, stem), "bin")):
        for variant in ("", ".fp32", ".bf16", ".fp16"):
            yield folder / f"{name}{variant}.{suffix}"
            yield folder / f"{name}.{suffix}.index{variant}.json"
            yield folder / f"{name}{variant}.{suffix}.index.json"  # as older writers call it


def _index_file(folder: Path, stem: str, files: list[Path]) -> Path | None:
    first = next(path for path in _candidates(folder, stem) if path.is_file())
    return None if [first] == files else first


def _open_safetensors(path: Path) -> tuple[dict[str, Lazy], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:  # checks the header against the file's length
            metadata = dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); copy or export it again") from None
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    kinds = {stored: name for name, stored in DTYPES.items()}
    if other := next((name for name, row in header.items() if row["dtype"] not in kinds), None):
        raise ValueError(f"{path}: {other} is of type {header[other]['dtype']}; if_jax reads {', '.join(kinds)}")
    content = np.memmap(path, np.uint8, mode="r", offset=8 + length) if _has_content(header) else np.empty(0, np.uint8)

    def lazy(row: dict[str, Any]) -> Lazy:
        (start, end), shape, dtype = row["data_offsets"], tuple(row["shape"]), _numpy_dtype(kinds[row["dtype"]])
        # A fresh view for every reader: what is mapped costs no memory of our own.
        return Lazy(shape, dtype, lambda: np.asarray(content[start:end]).view(dtype).reshape(shape))

    return {name: lazy(row) for name, row in header.items()}, metadata


def _has_content(header: Mapping[str, Any]) -> bool:
    return any(row["data_offsets"][1] for row in header.values())


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


def _write_safetensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    tensors: Iterator[tuple[str, np.ndarray]],
    metadata: Mapping[str, str],
    progress: BytesWritten | None,
) -> None:
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


def _numpy_dtype(dtype: str) -> np.dtype:
    return np.dtype(getattr(jnp, dtype))
