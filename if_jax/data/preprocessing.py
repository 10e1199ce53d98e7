"""From the bytes of any picture file to the square RGB picture a stage is trained on, as IF prepared its pictures.

The first frame is turned upright, laid over white where it is transparent, cut square about a shifted centre (by at
most a tenth of its short side, DeepFloyd IF's model card) and scaled down by Pillow's antialiased bicubic filter.
"""

from __future__ import annotations

import dataclasses
import io
import math
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageOps

SUFFIXES = frozenset(
    (
        *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
        *(".avif", ".jp2", ".j2k"),
    )
)
_HEAD = 2**14  # bytes of a picture that are looked at first for its size
_PILLOW = r"PIL\."
# Formats decoded by a library of Pillow's own; others (EPS) would start programs on a stranger's file.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO")


class UnusableRecord(ValueError):
    """A picture or caption that cannot be trained on; its text is the reason, the same for all of a kind."""


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What is done to a stored record when it is shown; drawn scenes need none of it."""

    shift: float = 0.1  # largest shift of the square cut from the middle, in short sides (IF: 0.1)
    clean: bool = False  # clean captions as IF does; it destroys the words of signs
    preserve_case: bool = False  # do not lower-case captions; IF does


def open_picture(encoded: bytes) -> Image.Image:
    """A picture file's bytes as a picture, not yet decoded: the one door for every file that we did not write.

    From memory, since Pillow maps an uncompressed TIFF from its file, and then loses its EXIF rotation.

    Args:
      encoded: of a format in `FORMATS`, whatever the file was called.

    Raises:
      PIL.UnidentifiedImageError: it is of none of them, EPS for example, on which Pillow would start Ghostscript.
      Exception: Pillow's own, for what is damaged or enormous.
    """
    Image.init()  # where formats are named, Pillow looks only among those it has loaded
    return Image.open(io.BytesIO(encoded), formats=[name for name in FORMATS if name in Image.OPEN])


def read_picture(encoded: bytes) -> Image.Image:
    """Decode a picture file's bytes to an upright RGB picture.

    Grey, palette, alpha (over white), CMYK, 16 bit and the first frame of animated files are converted.

    Args:
      encoded: of a format in `FORMATS`, whatever the file was called.

    Raises:
      UnusableRecord: "empty file", "too many pixels" or "unreadable image".
    """
    if not encoded:
        raise UnusableRecord("empty file")
    _allow_damaged_metadata()
    try:
        with open_picture(encoded) as stored:
            if stored.width * stored.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise UnusableRecord("too many pixels")
            return to_rgb(stored)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UnusableRecord("too many pixels") from None
    except UnusableRecord:
        raise
    except Exception:  # decoders raise whatever they stumble over in a damaged file; one file must not end a run
        raise UnusableRecord("unreadable image") from None


def read_size(encoded: bytes) -> tuple[int, int]:
    """Width and height of the picture that `read_picture` would make, by the head of its file alone.

    Args:
      encoded: of a format in `FORMATS`, whole.

    Raises:
      UnusableRecord: as of `read_picture`, where the head shows it.
    """
    if not encoded:
        raise UnusableRecord("empty file")
    _allow_damaged_metadata()
    try:
        try:
            return _head_size(encoded[:_HEAD])
        except UnusableRecord:
            raise
        except Exception:  # what tells the size stands behind the first kilobytes, after a colour profile say
            return _head_size(encoded)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UnusableRecord("too many pixels") from None
    except UnusableRecord:
        raise
    except Exception:
        raise UnusableRecord("unreadable image") from None


def _head_size(encoded: bytes) -> tuple[int, int]:
    with open_picture(encoded) as stored:
        if stored.format == "TIFF":  # of which Pillow has turned the size in some versions
            return read_picture(encoded).size
        width, height = stored.size
        if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise UnusableRecord("too many pixels")
        asked = stored.format != "PNG" or "exif" in stored.info  # a PNG would be decoded to look behind its pixels
        turned = asked and stored.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return (height, width) if turned else (width, height)


def _allow_damaged_metadata() -> None:
    """Damaged metadata is no reason to speak of a readable picture.

    The filter stays, for Pillow's warnings alone: `catch_warnings` is the whole process's, and threads that leave it
    in another order than they entered silence everything for good.
    """
    if not any(row[0] == "ignore" and row[3] is not None and row[3].pattern == _PILLOW for row in warnings.filters):
        warnings.filterwarnings("ignore", module=_PILLOW)


def to_rgb(picture: Image.Image, background: str = "white") -> Image.Image:
    """Any picture as upright 8-bit RGB: what is transparent shows the background, 16 bits become 8.

    Modes I (32 bits) and F do not say how deep they are: values past 255 are 16-bit ones, others 8-bit ones.
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode[0] in "IF":  # Pillow would clip them rather than scale
        values = np.asarray(picture, np.float32)
        deep = picture.mode.startswith("I;16") or values.max(initial=0) > 255
        picture = Image.fromarray(np.rint(np.clip(values / (257 if deep else 1), 0, 255)).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("LA" if picture.mode == "La" else "RGBA").convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, background), picture)
    return picture.convert("RGB")


def fit(picture: Image.Image, size: int, shift: float = 0.0) -> Image.Image:
    """Cut square and scale to `size` px.

    Args:
      picture: of any shape.
      size: side of the result in pixels.
      shift: how far the cut lies from the middle of the longer side, in short sides; IF draws it from [-0.1, 0.1].
        It ends at the picture's edge.

    Returns:
      The square picture.
    """
    side = min(picture.size)
    left, top = (_start(length - side, side, shift) for length in picture.size)
    if picture.size != (side, side):  # cut first: scaling a part of a picture would mix in what lies around it
        picture = picture.crop((left, top, left + side, top + side))
    return picture if side == size else picture.resize((size, size), Image.Resampling.BICUBIC)


def read_caption(encoded: bytes) -> str:
    """A caption from a file's bytes, without outer white space.

    Raises:
      UnusableRecord: "caption is not UTF-8" or "no caption".
    """
    try:
        caption = encoded.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise UnusableRecord("caption is not UTF-8") from None
    if not caption:
        raise UnusableRecord("no caption")
    return caption


def _start(slack: int, side: int, shift: float) -> int:
    return min(max(slack // 2 + round(shift * side), 0), slack)
