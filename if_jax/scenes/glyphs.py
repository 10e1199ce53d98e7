"""Capital letters as a small atlas of coverage values, drawn once by Pillow's built-in font."""

from __future__ import annotations

import functools
import string

import numpy as np

ALPHABET = string.ascii_uppercase
_MASTER = 256  # pixels per cell at which Pillow draws; every atlas is an exact box average of it


@functools.cache
def atlas(cell: int) -> tuple[np.ndarray, np.ndarray]:
    """Letters A-Z, prefiltered for one resolution, so that text looks alike at every picture size.

    Args:
      cell: cell edge in pixels, a divisor of 256.

    Returns:
      coverage: (26, cell, cell) float32 in [0, 1]; row 0 is the top; capitals fill the height, centred horizontally.
      advance: (26,) float32, width of each letter with its spacing, in cells.

    Raises:
      ValueError: `cell` does not divide 256.
    """
    if cell < 1 or _MASTER % cell:
        raise ValueError(f"glyph cell of {cell} px: choose a divisor of {_MASTER}")
    master, advance = _draw_letters()
    step = _MASTER // cell
    coverage = master.reshape(len(ALPHABET), cell, step, cell, step).mean(axis=(2, 4))
    return coverage.astype(np.float32), advance


@functools.cache
def _draw_letters() -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image, ImageDraw, ImageFont  # Pillow's own font: the same letters on every machine

    font = ImageFont.load_default(size=1.05 * _MASTER)
    cells, advance = [], []
    for letter in ALPHABET:
        left, top, right, bottom = map(int, font.getbbox(letter))
        canvas = Image.new("L", (right - left, bottom - top), 0)
        ImageDraw.Draw(canvas).text((-left, -top), letter, fill=255, font=font, stroke_width=_MASTER // 64)
        # Every capital gets the same height (round letters overshoot the line a little, which no one misses here).
        width = min(round((right - left) * _MASTER / (bottom - top)), _MASTER)
        canvas = canvas.resize((width, _MASTER), Image.Resampling.LANCZOS)
        cell = Image.new("L", (_MASTER, _MASTER), 0)
        cell.paste(canvas, ((_MASTER - width) // 2, 0))
        cells.append(np.asarray(cell, np.float32) / 255.0)
        advance.append(width / _MASTER + 0.16)
    return np.stack(cells), np.asarray(advance, np.float32)
