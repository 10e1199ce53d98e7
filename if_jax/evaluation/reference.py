"""The pictures that drawn ones are measured against: a folder of them, or the features kept from one before."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from if_jax.checkpoints.files import atomic_file
from if_jax.data.preprocessing import SUFFIXES, UnusableRecord, fit, read_picture
from if_jax.evaluation.features import FeatureNetwork

_READ = 64  # pictures held at a time
_IDENTITY = "identity"  # the array of an .npz that says what made it, as JSON


class Reference(NamedTuple):
    """Features of true pictures by network, and what they are of."""

    features: Mapping[str, np.ndarray]  # network -> (N, D) float32
    sha256: str  # over the names and contents of the pictures

    @property
    def pictures(self) -> int:
        """How many pictures there are."""
        return len(next(iter(self.features.values())))


def read_reference(
    path: str | Path,
    networks: Mapping[str, FeatureNetwork],
    side: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Reference:
    """Features of a folder's pictures, or those an .npz of `write_reference` holds.

    Args:
      path: a folder, looked through with all below it, or the .npz.
      networks: by name; an .npz must have been made by the same.
      side: cut every picture square and scale it down to so many pixels, as training does; None: take them as they
        are, all of one size.
      progress: pictures done, of how many.

    Raises:
      FileNotFoundError: there is nothing.
      ValueError: pictures of mixed sizes, one that cannot be read, or features of another network or size.
    """
    path = Path(path)
    if path.is_file():
        return _read_kept(path, networks, side)
    files = _files(path)
    known, made = hashlib.sha256(), {name: [] for name in networks}
    size: tuple[int, int] | None = None
    for start in range(0, len(files), _READ):
        progress(start, len(files))
        pictures = []
        for file in files[start : start + _READ]:
            content = file.read_bytes()
            known.update(_line(path, file, content))
            picture = _opened(file, content, side)
            size = size or picture.size
            if picture.size != size:
                raise ValueError(
                    f"{file} is {picture.width}×{picture.height} px, {files[0].name} is {size[0]}×{size[1]}: "
                    "give --reference-size 256 to cut and scale all to one size"
                )
            pictures.append(picture)
        for name, network in networks.items():
            made[name].append(network.embed(pictures))
    progress(len(files), len(files))
    return Reference({name: np.concatenate(rows) for name, rows in made.items()}, known.hexdigest())


def pictures_sha256(folder: str | Path) -> str:
    """`Reference.sha256` of a folder, without looking at the pictures.

    Args:
      folder: of pictures.

    Raises:
      FileNotFoundError: there are none.
    """
    folder, known = Path(folder), hashlib.sha256()
    for file in _files(folder):
        known.update(_line(folder, file, file.read_bytes()))
    return known.hexdigest()


def write_reference(
    path: Path, reference: Reference, networks: Mapping[str, FeatureNetwork], side: int | None = None
) -> None:
    """Keep the features, so that the pictures need not be read again.

    Args:
      path: of the .npz.
      reference: what to keep.
      networks: that made it.
      side: as for `read_reference`.
    """
    identity = {"pictures_sha256": reference.sha256, "side": side}
    identity |= {"networks": {name: network.identity for name, network in networks.items()}}
    text = np.frombuffer(json.dumps(identity, sort_keys=True).encode(), np.uint8)
    arrays: dict[str, Any] = {_IDENTITY: text, **reference.features}
    with atomic_file(path) as beside, open(beside, "wb") as file:
        np.savez(file, **arrays)


def _files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    if not files:
        raise FileNotFoundError(
            f"--reference {folder}: holds no pictures; give a folder of them, or an .npz kept before"
        )
    return files


def _line(folder: Path, file: Path, content: bytes) -> bytes:
    return f"{file.relative_to(folder).as_posix()} {hashlib.sha256(content).hexdigest()}\n".encode()


def _read_kept(path: Path, networks: Mapping[str, FeatureNetwork], side: int | None) -> Reference:
    again = "give the folder of pictures instead"
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as kept:
            arrays = {name: kept[name] for name in kept.files}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError):
        raise ValueError(f"{path}: is no whole .npz of features; {again}") from None
    if _IDENTITY not in arrays:
        raise ValueError(
            f"{path}: does not say which network, weights and resizer made it, so nothing compares; {again}"
        )
    identity = json.loads(arrays[_IDENTITY].tobytes())
    for name, network in networks.items():
        kept = identity["networks"].get(name)
        if kept is None:
            raise ValueError(f"{path}: holds no features of {name}, only of {', '.join(identity['networks'])}; {again}")
        if kept != network.identity:
            key = next(key for key in network.identity if kept.get(key) != network.identity[key])
            raise ValueError(
                f"{path}: {name} had another {key} ({kept.get(key)}, now {network.identity[key]}); {again}"
            )
    if side != identity["side"]:
        raise ValueError(f"{path}: was made with --reference-size {identity['side']}, now {side}; {again}")
    return Reference({name: arrays[name] for name in networks}, identity["pictures_sha256"])


def _opened(file: Path, content: bytes, side: int | None) -> Image.Image:
    try:
        picture = read_picture(content)
    except UnusableRecord as error:
        raise ValueError(f"{file}: {error}; take it out of the folder") from None
    return picture if side is None else fit(picture, side)
