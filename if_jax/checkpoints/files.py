"""Files and folders that are written whole or not at all, and the small JSON files in them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from etils import epath

AnyPath = TypeVar("AnyPath", Path, epath.Path)
Config = TypeVar("Config")

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# All that stands in a folder we write: a release, a converted model or a text encoder. Nothing else is ever replaced.
_OWN_NAMES = re.compile(
    r"cascade\.json|model_index\.json|if_jax\.json|README\.md|stage_[IVX]+|unet|text_encoder|tokenizer|t5"
    r"|(image_noising_)?scheduler|feature_extractor|safety_checker|watermarker|config\.yml|config\.json"
    r"|tokenizer(_config)?\.json|spiece\.model|(pytorch_)?model[\w.-]*\.(bin|safetensors|json)|\.gitattributes|\.DS_Store"
)
# How our configurations annotate their fields, and the values of JSON and YAML that fit.
_KINDS = {"int": int, "float": (int, float), "bool": bool, "str": str}


def read_json(path: Path) -> dict:
    """Read a JSON object.

    Raises:
      FileNotFoundError: the file is missing.
      ValueError: it holds no JSON, or something else than an object.
    """
    require_file(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); copy or export the release again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a JSON {type(content).__name__}, expected an object")
    return content


def parse_config(path: Path, content: Any, parse: Callable[[Any], Config]) -> Config:
    """Parse a file's content into one of our configurations, and check the type of every field.

    Args:
      path: the file, for messages.
      content: what it holds, out of JSON or YAML.
      parse: makes the dataclass.

    Returns:
      The dataclass.

    Raises:
      ValueError: names the file and what does not fit.
    """
    try:
        config: Any = parse(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (TypeError, AttributeError, KeyError, OverflowError) as error:
        raise ValueError(f"{path}: a value is of the wrong type ({error}); copy the file again") from None
    for field in fields(config):
        value = getattr(config, field.name)
        if not _fits(value, str(field.type)):
            raise ValueError(f"{path}: {field.name}={value!r:.80} must be of type {field.type}; copy the file again")
    return config


def write_json(path: Path, content: Mapping) -> None:
    """Write a JSON object with sorted keys, the way model folders usually hold it."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def parse_bytes(text: str) -> int:
    """Bytes of a size in words: "5GB" is 5,000,000,000 and "200MiB" 209,715,200.

    Raises:
      ValueError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", text.strip(), re.IGNORECASE)
    if not match:
        raise ValueError(f"size {text!r} is not understood: write it like 500MB or 5GB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))


def user_cache() -> Path | None:
    """The folder for what may be made again, not made yet; None for a user without a home (a container's, say)."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(base) / "if_jax"


def require_file(path: Path) -> None:
    """Refuse a file that is not there, or of which a clone without Git LFS holds only the address.

    Raises:
      FileNotFoundError: names the file.
      ValueError: it is a Git LFS pointer.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the release lacks this file; copy the folder again or export it anew")
    with open(path, "rb") as file:
        pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
    if pointer:
        raise ValueError(
            f"{path}: is a Git LFS pointer, not the file itself: run `git lfs pull` in the clone (git lfs install "
            "comes first), or download the file"
        )


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_file(path: AnyPath) -> Iterator[AnyPath]:
    """Write a file whole or not at all: beside its place, then renamed; several processes may do so at once.

    Args:
      path: where the file will stand, on a disk or in a bucket; its folder must exist.

    Yields:
      The path to write to. It is renamed onto `path` on success and removed on failure.
    """
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield beside
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(destination: Path, overwrite: bool = False) -> Iterator[Path]:
    """Write a folder whole or not at all: beside its place, then renamed.

    Args:
      destination: where the folder will stand; its parents are made.
      overwrite: replace what stands there, if it is an empty folder or one of ours, with nothing beside.

    Yields:
      A new folder. It is renamed onto `destination` on success and removed, with the new parents, on failure.

    Raises:
      ValueError: the destination exists and `overwrite` is false, or it holds what is not ours and would be lost.
      OSError: the disk is full, in one clear line.
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


def _fits(value: Any, annotation: str) -> bool:
    """Whether a value is of the type that a field of our configurations is annotated with."""
    if annotation.endswith(" | None"):
        return value is None or _fits(value, annotation.removesuffix(" | None"))
    if entries := re.fullmatch(r"tuple\[(\w+), \.\.\.\]", annotation):
        return isinstance(value, tuple) and all(_is_entry(entry, entries[1]) for entry in value)
    return isinstance(value, _KINDS[annotation])


def _is_entry(value: Any, kind: str) -> bool:
    if kind in _KINDS:
        return isinstance(value, _KINDS[kind])
    return type(value).__name__ == kind and all(_fits(getattr(value, row.name), str(row.type)) for row in fields(value))


def _is_ours(folder: Path) -> bool:
    """Whether a folder bears the mark of a release, a converted model or a text encoder."""

    def says(name: str, key: str, start: str = "") -> bool:
        try:
            value = json.loads((folder / name).read_text(encoding="utf-8"))[key]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return str(value).startswith(start)

    return (
        says("cascade.json", "stages")
        or says("model_index.json", "_class_name", "IF")
        or says("if_jax.json", "format")
        or (says("tokenizer_config.json", "tokenizer_class") and says("config.json", "model_type", "t5"))
    )


def _check_destination(destination: Path, overwrite: bool) -> None:
    if destination.is_symlink():
        raise ValueError(f"{destination} is a link: give the folder it leads to, or remove the link")
    if not destination.exists():
        return
    if not overwrite:
        raise ValueError(f"{destination} exists already: choose another folder or ask to overwrite it")
    names = sorted(path.name for path in destination.iterdir()) if destination.is_dir() else [destination.name]
    if names and not (destination.is_dir() and _is_ours(destination)):
        raise ValueError(f"{destination} is not a release, so it is not overwritten: choose another folder")
    if foreign := [name for name in names if not _OWN_NAMES.fullmatch(name)]:
        raise ValueError(
            f"{destination} holds {', '.join(foreign[:3])} beside a release, which would be lost: "
            "choose another folder, or move that away"
        )


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
