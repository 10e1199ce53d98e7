"""The pictures an evaluation is about, drawn in tiles into a folder, so that one that was interrupted goes on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from if_jax.checkpoints.files import atomic_file, read_json, sha256_of
from if_jax.inference.cascade import Cascade

TILE = 8  # pictures of stage I in one program on each device: however many there are, the pictures are the same bits
LARGE_TILE = 4  # … of stage II
REPORT_FILES = ("report.json", "report.html", "sheet.png")  # beside the folder of the pictures
_KEYS = {"cascade_sha256", "prompts_sha256"}  # of an identity: what marks a folder as ours
FEATURES = "{:05d}-features.npz"  # of a chunk of pictures, by its number
_OURS = re.compile(r"\d{4,}-((I|II|III|true-[\w-]+)\.png|features\.npz)")
PictureProgress = Callable[[str, int, int], None]  # what, pictures done, of how many


def claim_folder(folder: Path, identity: Mapping[str, Any], overwrite: bool = False) -> None:
    """Make a folder ready for the pictures of one evaluation; those that lie there already are of the same one.

    Args:
      folder: made where it does not exist.
      identity: all that the pictures depend on, as JSON values; kept in the folder.
      overwrite: drop the pictures of another evaluation.

    Raises:
      ValueError: the folder is of another evaluation and `overwrite` is false, or holds pictures of somebody else.
    """
    path, text = folder / "identity.json", json.dumps(identity, indent=1, sort_keys=True)
    ours = path.is_file() and read_json(path).keys() >= _KEYS
    beside = [] if is_report(folder.parent / REPORT_FILES[0]) else [folder.parent / name for name in REPORT_FILES]
    foreign = [file for file in (path, *folder.glob("*.png"), *beside) if not ours and file.exists()]
    if foreign:
        raise ValueError(f"{foreign[0]} exists and is not of an evaluation, so it is not replaced: give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists() and read_json(path) != json.loads(text):
        if not overwrite:
            raise ValueError(
                f"{folder} holds pictures of another cascade, seed or setting: give another --out, or --overwrite"
            )
        for old in folder.iterdir():
            if _OURS.fullmatch(old.name):
                old.unlink()
        path.unlink()
    if not path.exists():
        path.write_text(text + "\n", encoding="utf-8")


def is_report(path: Path) -> bool:
    """Whether a file is the report of an evaluation."""
    try:
        return path.is_file() and read_json(path).keys() >= _KEYS
    except ValueError:
        return False


def cascade_sha256(folder: Path) -> str:
    """Identity of a release, hexadecimal: SHA-256 over the names and contents of its files, but for texts about it."""
    names = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in (".json", ".safetensors"))
    lines = "".join(f"{path.relative_to(folder).as_posix()} {sha256_of(path)}\n" for path in names)
    return hashlib.sha256(lines.encode()).hexdigest()


def stage_one(
    cascade: Cascade, captions: Sequence[str], folder: Path, options: Mapping[str, Any], progress: PictureProgress
) -> list[Image.Image]:
    """Draw stage I's pictures; picture k of the seed is caption k's.

    Args:
      cascade: what draws.
      captions: one for each picture.
      folder: of a `claim_folder`; pictures it holds are not drawn again.
      options: what `Cascade.dream` takes besides; stage II's are passed over.
      progress: called before every tile and at the end.

    Returns:
      The pictures in the order of the captions.
    """

    options = {word: value for word, value in options.items() if word != "if_II_kwargs"}

    def draw(rows: Sequence[int]) -> list[Image.Image]:
        texts = [captions[row] for row in rows]
        return cascade.dream(texts, **options, first_picture=rows[0], stages=1, batch_size=TILE)["I"]

    return _in_tiles("I", range(len(captions)), TILE * cascade.placement.ways, draw, folder, progress)


def stage_two(
    cascade: Cascade,
    captions: Mapping[int, str],
    low: Sequence[Image.Image],
    folder: Path,
    options: Mapping[str, Any],
    progress: PictureProgress,
    name: str = "II",
) -> list[Image.Image]:
    """Draw stage II's pictures of some captions.

    Args:
      cascade: what draws.
      captions: by number, which is that of the picture of the seed.
      low: stage I's pictures, in the same order.
      folder: of a `claim_folder`; pictures it holds are not drawn again.
      options: what `Cascade.super_resolution` takes besides; stage I's are passed over.
      progress: called before every tile and at the end.
      name: part of the files' names.

    Returns:
      The pictures in the order of the captions.
    """
    low_of = dict(zip(captions, low, strict=True))
    options = {word: value for word, value in options.items() if word != "if_I_kwargs"}

    def draw(rows: Sequence[int]) -> list[Image.Image]:
        texts, pictures = [captions[row] for row in rows], [low_of[row] for row in rows]
        made = cascade.super_resolution(
            tuple(pictures), texts, **options, first_picture=rows[0], stages=2, batch_size=LARGE_TILE
        )
        return made["II"]

    return _in_tiles(name, list(captions), LARGE_TILE * cascade.placement.ways, draw, folder, progress)


def _in_tiles(
    name: str,
    numbers: Sequence[int],
    size: int,
    draw: Callable[[Sequence[int]], list[Image.Image]],
    folder: Path,
    progress: PictureProgress,
) -> list[Image.Image]:
    """Draw what FOLDER does not hold yet as FOLDER/0000-NAME.png; all pictures in order."""
    paths = [folder / f"{number:04d}-{name}.png" for number in numbers]
    for start in range(0, len(paths), size):
        progress(f"stage {name}", start, len(paths))
        tile = paths[start : start + size]
        if all(path.exists() for path in tile):
            continue
        for path, picture in zip(tile, draw(numbers[start : start + size]), strict=True):
            with atomic_file(path) as beside:
                picture.save(beside, format="PNG")
    progress(f"stage {name}", len(paths), len(paths))
    return [Image.open(path, formats=("PNG",)).convert("RGB") for path in paths]
