"""Words on signs, read by programs that were made for photographs: RapidOCR, and Tesseract as a second opinion.

Both are optional (`pip install "if_jax[eval]"`; Tesseract is a system package): where one is missing it costs one line
and its score.
"""

from __future__ import annotations

import io
import logging
import shutil
import subprocess
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

OcrReader = Callable[[Image.Image], str]
_LEAST = 256  # px: smaller pictures are enlarged
_BOARD = (3.5 / 64, 15.5 / 64)  # where a sign's board is, within its upper and lower edge, as shares of the picture
_HEIGHT = 96  # px of that strip for Tesseract
_DARK = 140  # of 255


def readers(say: Callable[[str], None]) -> dict[str, OcrReader]:
    """Open the readers of text that are installed.

    Args:
      say: is given one line for each that is missing.

    Returns:
      By name, functions that give a picture's text.
    """
    installed = {}
    for name, make, remedy in (
        ("rapidocr", _rapidocr, 'pip install "if_jax[eval]"'),
        ("tesseract", _tesseract, "apt install tesseract-ocr, or its like"),
    ):
        try:
            installed[name] = make()
        except (ImportError, OSError) as error:  # opencv without the system's libGL raises the first
            say(f"no {name}, so its score of words is left out ({str(error) or 'not found'}): {remedy}")
    return installed


def read_words(reader: OcrReader, pictures: Sequence[Image.Image]) -> list[str]:
    """The letters in each picture, without spaces; "" where there are none."""
    return ["".join(c for c in reader(_at_least(picture, _LEAST)) if c.isalnum()) for picture in pictures]


def sign_of(picture: Image.Image) -> Image.Image:
    """The line of text on a sign, for Tesseract, which wants nothing else and takes the board's sides for letters.

    Columns that are dark from top to bottom are such sides, letters being lower than the board: they are painted white.
    """
    width, height = picture.size
    strip = picture.convert("L").crop((0, round(_BOARD[0] * height), width, round(_BOARD[1] * height)))
    line = np.array(strip)
    line[:, line.max(axis=0) < _DARK] = 255
    return _at_least(Image.fromarray(line), _HEIGHT)


def _at_least(picture: Image.Image, height: int) -> Image.Image:
    if picture.height >= height:
        return picture
    return picture.resize((round(picture.width * height / picture.height), height), Image.Resampling.BICUBIC)


def _rapidocr() -> OcrReader:
    from rapidocr_onnxruntime import RapidOCR  # pyright: ignore[reportMissingImports]  (an extra)

    logging.getLogger("RapidOCR").setLevel(logging.ERROR)
    engine = RapidOCR()  # finds the word by itself: on the strip alone it sees letters twice, and takes longer

    def read(picture: Image.Image) -> str:
        lines, _ = engine(np.asarray(picture.convert("RGB"))[..., ::-1], use_cls=False)
        return " ".join(text for _, text, _ in lines or [])

    return read


def _tesseract() -> OcrReader:
    program = shutil.which("tesseract")
    if program is None:
        raise OSError("no such program")

    def read(picture: Image.Image) -> str:
        content = io.BytesIO()
        sign_of(picture).save(content, "PNG")
        call = [program, "stdin", "stdout", "--psm", "7", "-l", "eng"]
        return subprocess.run(call, input=content.getvalue(), capture_output=True, check=False).stdout.decode()

    return read
