"""Tensor files, read one tensor at a time: safetensors (whole or in shards) and PyTorch's `.bin`.

A safetensors file is eight bytes (little-endian length of the header), a JSON header naming the type, shape and byte
range of every tensor, then the raw tensors. Tensors are read from memory-mapped files when they are asked for, so a
net of any size is converted, or put on its devices, without a second copy of it in memory.
Source: the format description in the safetensors README.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp  # for bfloat16, which numpy itself lacks
import numpy as np

from if_jax.checkpoints.files import read_json, require_file

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


def read_bin(path: Path, left_out: str = "", before_zip: bool = False) -> dict[str, Lazy]:
    """Open a PyTorch file of tensors, memory-mapped; whatever would run code while it is opened is refused.

    Args:
      path: the file.
      left_out: ends of names that are passed over, whatever they hold.
      before_zip: also read the form of PyTorch before 1.6, whole into memory.

    Returns:
      The tensors by name.

    Raises:
      ValueError: the file is damaged or holds anything but tensors, or PyTorch is not installed.
    """
    require_file(path)
    torch = import_torch(f"{path}: reading .bin files")
    from pickle import UnpicklingError

    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"
        if not (is_zip or before_zip):
            raise ValueError(f"{path}: no PyTorch file, or older than PyTorch 1.6; copy it, or torch.save it, again")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except UnpicklingError:
        raise ValueError(f"{path}: refused, it holds more than tensors and could run code when opened") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        raise ValueError(f"{path}: not a whole PyTorch file ({reason}); copy it again") from None
    if left_out and isinstance(state, dict):
        state = {name: tensor for name, tensor in state.items() if not str(name).endswith(left_out)}
    pairs = state.items() if isinstance(state, dict) else [(None, None)]
    if not all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in pairs):
        raise ValueError(f"{path}: holds something else than named tensors; give a file of weights alone")
    kinds = {getattr(torch, name): numpy_dtype(name) for name in DTYPES}
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


def tensor_bytes(spec: TensorSpec) -> int:
    """Bytes of one tensor as it is stored."""
    shape, dtype = spec
    return int(np.prod(shape, dtype=np.int64)) * numpy_dtype(dtype).itemsize


def import_torch(what: str) -> Any:
    """PyTorch, which only `.bin` files need.

    Args:
      what: is done with it, for the message.

    Raises:
      ValueError: it is not installed.
    """
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

    require_file(path)
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
        (start, end), shape, dtype = row["data_offsets"], tuple(row["shape"]), numpy_dtype(kinds[row["dtype"]])
        # A fresh view for every reader: what is mapped costs no memory of our own.
        return Lazy(shape, dtype, lambda: np.asarray(content[start:end]).view(dtype).reshape(shape))

    return {name: lazy(row) for name, row in header.items()}, metadata


def _has_content(header: Mapping[str, Any]) -> bool:
    return any(row["data_offsets"][1] for row in header.values())


def numpy_dtype(dtype: str) -> np.dtype:
    """The NumPy type of a key of DTYPES."""
    return np.dtype(getattr(jnp, dtype))
