"""Arrays to pictures, pictures to grids and numbered PNG files that say how they were drawn."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from if_jax.checkpoints.files import atomic_file
from if_jax.inference.guard import GuardScores
from if_jax.inference.inputs import open_file

Notes = Callable[[str, int], Mapping[str, object]]  # stage, row → what the PNG says of itself
_KEY = "if_jax"  # of the PNG's text chunk
_TEXT_LINES = 3


class Drawn(dict):
    """{"I": [PIL, …], "II": [PIL, …], …}; a notebook shows the last stage's pictures.

    `guarded` has what a guard made of them, by stage; it is empty without one.
    """

    def __init__(self, *stages: Any, **named: Any) -> None:
        super().__init__(*stages, **named)
        self.guarded: dict[str, list[GuardScores]] = {}

    def _repr_png_(self) -> bytes | None:
        pictures = next(reversed(self.values()), [])
        return grid(pictures)._repr_png_() if pictures and isinstance(pictures[0], Image.Image) else None


def to_pil(image: np.ndarray) -> Image.Image:
    """One picture (H, W, 3) in [-1, 1] as 8-bit RGB; values outside are clamped."""
    scaled = np.clip(np.asarray(image, np.float32) / 2 + 0.5, 0, 1) * 255
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


def grid(
    pictures: Sequence[Image.Image], columns: int | None = None, gap: int = 2, captions: Sequence[str] | None = None
) -> Image.Image:
    """Pictures of one size side by side, row by row.

    Args:
      pictures: at least one.
      columns: how many in a row; without, the grid is nearly square.
      gap: pixels between them.
      captions: one for each picture, written below it, as much as fits.

    Raises:
      ValueError: where there is no picture.
    """
    if not pictures:
        raise ValueError("no pictures: a grid needs at least one")
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    width, height = pictures[0].size
    font = ImageFont.load_default()
    line = sum(font.getmetrics()) if isinstance(font, ImageFont.FreeTypeFont) else 11
    below = _TEXT_LINES * line if captions else 0
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + below + gap) - gap), "white")
    pen = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pictures):
        left, top = (i % columns) * (width + gap), (i // columns) * (height + below + gap)
        sheet.paste(picture, (left, top))
        for k, text in enumerate(_lines(captions[i], width, font) if captions else []):
            pen.text((left, top + height + k * line), text, fill="black", font=font)
    return sheet


def save_pictures(
    drawn: Mapping[str, Sequence[Image.Image]],
    out: str | Path,
    overwrite: bool = False,
    *,
    first: int = 0,
    captions: Sequence[str] | None = None,
    notes: Notes | None = None,
    watermark: bool | Path | None = None,
) -> tuple[list[Path], list[Path]]:
    """Write OUT/0000-I.png, … in prompt order and one OUT/grid-I.png for each stage.

    Args:
      drawn: stage → its pictures.
      out: the folder; it is made.
      overwrite: replace pictures of if_jax that exist; otherwise they are kept, and those of others always.
      first: number of the first picture.
      captions: of the grids.
      notes: kept in each PNG, see `read_notes`.
      watermark: True: our own mark; or a PNG of the user's.

    Returns:
      Paths that were written, and paths that were kept.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if watermark:
        mark = read_mark(watermark)
        drawn = {stage: [with_watermark(picture, mark) for picture in rows] for stage, rows in drawn.items()}
    written: list[Path] = []
    kept: list[Path] = []
    files = [
        (f"{first + row:04d}-{stage}.png", picture, notes and notes(stage, row))
        for stage, pictures in drawn.items()
        for row, picture in enumerate(pictures)
    ]
    files += [(f"grid-{stage}.png", grid(rows, captions=captions), None) for stage, rows in drawn.items()]
    for name, picture, about in files:
        path = out / name
        if path.exists() and not (overwrite and is_own(path)):
            kept.append(path)
            continue
        write_png(path, picture, about)
        written.append(path)
    return written, kept


def write_png(path: Path, picture: Image.Image, notes: Mapping[str, object] | None = None) -> None:
    """Writes a picture, whole or not at all, that `is_own` knows.

    Args:
      path: of the file; one that exists is replaced.
      picture: of any mode that PNG has.
      notes: kept in it, JSON.
    """
    with atomic_file(path) as beside:
        beside.write_bytes(png_bytes(picture, notes))


def png_bytes(picture: Image.Image, notes: Mapping[str, object] | None = None) -> bytes:
    """A picture as a PNG file that `is_own` knows, with notes (JSON) in it."""
    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_itxt(_KEY, json.dumps(notes or {}))
    picture.save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def is_own(path: str | Path) -> bool:
    """Whether a file is a picture that `write_png` has written."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return _KEY in picture.info
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError):
        return False


def read_notes(path: str | Path | IO[bytes]) -> dict[str, Any]:
    """What `save_pictures` has noted in a PNG (JSON), a file or one that is open.

    Raises:
      FileNotFoundError: where there is no file.
      ValueError: where it holds no notes.
    """
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            notes = json.loads(picture.info[_KEY])
        if isinstance(notes, dict) and notes:
            return notes
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; give a picture that if-jax has drawn") from None
    except (KeyError, ValueError, TypeError, OSError, Image.DecompressionBombError):
        pass
    raise ValueError(f"{path}: holds no settings of if-jax; give a PNG as it was written, not a copy")


def with_watermark(picture: Image.Image, mark: Image.Image) -> Image.Image:
    """The picture with a mark in its lower right corner, of the size and place that IF gives its own.

    On w×h pixels it is 62 K wide with a margin of 14 K, K = √(wh)/1024.

    Args:
      picture: RGB.
      mark: RGBA, square.
    """
    width, height = picture.size
    scale = math.sqrt(width * height) / 1024
    side, margin = max(1, int(62 * scale)), int(14 * scale)
    small = mark.resize((side, side), Image.Resampling.BICUBIC)
    marked = picture.copy()
    marked.paste(small, (width - margin - side, height - margin - side), small)
    return marked


def read_mark(watermark: Path | Literal[True]) -> Image.Image:
    """The mark that a user asks for, RGBA: our own, or a PNG of theirs."""
    return own_mark() if watermark is True else open_file(watermark, widest=math.inf).convert("RGBA")


def own_mark() -> Image.Image:
    """Our own mark, 62×62 RGBA: a cube in outline."""
    mark = Image.new("RGBA", (248, 248), (0, 0, 0, 0))
    pen, line = ImageDraw.Draw(mark), {"fill": (255, 255, 255, 200), "width": 14}
    top, right, bottom, left, low = (124, 20), (220, 72), (124, 228), (28, 72), (124, 124)
    for ends in ((top, right), (right, low), (low, left), (left, top), (left, (28, 176)), (right, (220, 176))):
        pen.line(ends, **line)
    for ends in (((28, 176), bottom), ((220, 176), bottom), (low, bottom)):
        pen.line(ends, **line)
    return mark.resize((62, 62), Image.Resampling.LANCZOS)


def _lines(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    """The text broken at spaces into lines of at most `width` pixels; what does not fit is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines[:_TEXT_LINES]
