"""Arrays to pictures, pictures to grids and numbered PNG files."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def to_pil(image: np.ndarray) -> Image.Image:
    """One picture (H, W, 3) in [-1, 1] as 8-bit RGB; values outside are clamped."""
    scaled = np.clip(np.asarray(image, np.float32) / 2 + 0.5, 0, 1) * 255
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


def grid(pictures: Sequence[Image.Image], columns: int | None = None, gap: int = 2) -> Image.Image:
    """Pictures of one size side by side, row by row; nearly square unless `columns` is given."""
    if not pictures:
        raise ValueError("no pictures: a grid needs at least one")
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, ((i % columns) * (width + gap), (i // columns) * (height + gap)))
    return sheet


def save_pictures(
    drawn: Mapping[str, Sequence[Image.Image]], out: str | Path, overwrite: bool = False
) -> tuple[list[Path], list[Path]]:
    """Write OUT/0000-I.png, … in prompt order and one OUT/grid-I.png for each stage: (written, kept) paths.

    Files that exist are kept unless `overwrite`.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    kept: list[Path] = []
    for path, picture in _named(drawn, out):
        if path.exists() and not overwrite:
            kept.append(path)
            continue
        beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            picture.save(beside, format="PNG")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        written.append(path)
    return written, kept


def _named(drawn: Mapping[str, Sequence[Image.Image]], out: Path) -> list[tuple[Path, Image.Image]]:
    numbered = [
        (out / f"{i:04d}-{stage}.png", picture)
        for stage, pictures in drawn.items()
        for i, picture in enumerate(pictures)
    ]
    return numbered + [(out / f"grid-{stage}.png", grid(pictures)) for stage, pictures in drawn.items()]
