"""Pictures and masks of users, in whatever form they come, as arrays of the size that a stage draws at."""

from __future__ import annotations

import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from PIL import Image, UnidentifiedImageError

from if_jax.data.preprocessing import open_picture, to_rgb
from if_jax.diffusion import augment

ReadPicture = Image.Image | np.ndarray  # arrays: (H, W, 3) in [-1, 1]
Picture = ReadPicture | str | Path
_WIDEST = 8.0  # aspect ratio
_LARGEST = 100_000_000  # pixels
_OVERSHOOT = 0.5  # of pictures that were resampled with a filter of negative lobes, and not clipped


def read_picture(picture: Picture, word: str = "image") -> ReadPicture:
    """A picture of any form, ready to be fitted.

    Alpha is laid over white, 16 bits become 8, palettes and other colour spaces RGB, and EXIF rotation is carried out.

    Args:
      picture: PIL, a file, or floats (H, W, 3) in [-1, 1].
      word: what to call it in error messages.

    Returns:
      8-bit RGB; or, of floats, those in float32.

    Raises:
      ValueError: for what is no picture, is empty or is enormous.
      FileNotFoundError: where there is no such file.
    """
    if isinstance(picture, str | Path):
        picture = open_file(picture)
    if isinstance(picture, Image.Image):
        _check_size(word, picture.size)
        return to_rgb(picture)
    array = np.asarray(picture)
    if array.ndim != 3 or array.shape[-1] != 3 or not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"{word} is an array of {array.dtype} {array.shape}: give a picture (PIL or a file), or floats (H, W, 3) in"
            " [-1, 1]"
        )
    _check_size(word, picture_size(array))
    if not np.isfinite(array).all():
        raise ValueError(f"{word} holds values that are not finite: give floats in [-1, 1]")
    least, most = float(array.min()), float(array.max())
    if least < -1 - _OVERSHOOT or most > 1 + _OVERSHOOT:
        remedy = "divide by 127.5 and subtract 1" if least >= 0 and most <= 255 else "clip them"
        raise ValueError(f"{word} holds values from {least:g} to {most:g}: give floats in [-1, 1] ({remedy})")
    return array.astype(np.float32)


def read_mask(mask: Picture, size: tuple[int, int], word: str = "mask") -> Image.Image:
    """A mask of any form, ready to be fitted.

    Args:
      mask: PIL or a file, white where to draw; or (H, W) or (H, W, 1), bool or in [0, 1].
      size: (width, height) of its picture.
      word: what to call it in error messages.

    Returns:
      8-bit grey, white where to draw; what is transparent is not drawn.

    Raises:
      ValueError: for what is no mask, or where the two sizes differ.
      FileNotFoundError: where there is no such file.
    """
    if isinstance(mask, str | Path):
        mask = open_file(mask)
    if isinstance(mask, Image.Image):
        grey = to_rgb(mask, "black").convert("L")
    else:
        array = np.asarray(mask)
        array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
        if array.ndim != 2 or not (array.dtype == bool or np.issubdtype(array.dtype, np.number)):
            raise ValueError(f"{word} is an array of {array.dtype} {array.shape}: give (H, W), 0 to keep and 1 to draw")
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError(f"{word} holds values outside [0, 1]: 0 keeps, 1 draws")
        grey = Image.fromarray(np.rint(array.astype(np.float32) * 255).astype(np.uint8))
    if grey.size != size:
        raise ValueError(
            f"{word} is {grey.size[0]}x{grey.size[1]} and its picture {size[0]}x{size[1]}: make them the same size"
        )
    return grey


def picture_size(picture: ReadPicture) -> tuple[int, int]:
    """(width, height)."""
    return picture.size if isinstance(picture, Image.Image) else (picture.shape[1], picture.shape[0])


def middle(picture: ReadPicture) -> ReadPicture:
    """The square in the middle of a picture."""
    width, height = picture_size(picture)
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    if isinstance(picture, Image.Image):
        return picture.crop((left, top, left + side, top + side))
    return picture[top : top + side, left : left + side]


def fit_picture(picture: ReadPicture, size: tuple[int, int]) -> np.ndarray:
    """A picture at the size (H, W): (H, W, 3) float32 in [-1, 1].

    Resampled bicubic; arrays that fit already stay as they are.
    """
    height, width = size
    if isinstance(picture, Image.Image):
        resized = picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=None)
        return np.asarray(resized, np.float32) / 127.5 - 1.0
    if picture.shape[:2] == size:
        return picture
    return np.asarray(augment.downsample(jnp.asarray(picture)[None], size)[0])


def fit_mask(mask: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """A mask at the size (H, W): (H, W, 1) float32, 1 where to draw.

    Resampled bicubic and cut at a half, as diffusers does.
    """
    height, width = size
    resized = mask.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=None)
    return (np.asarray(resized, np.float32)[..., None] / 255 >= 0.5).astype(np.float32)


def parse_aspect_ratio(text: str) -> float:
    """Width over height of "3:2"; ValueError for what is no ratio, or past 1:8 or 8:1."""
    try:
        width, height = (float(part) for part in str(text).split(":"))
        ratio = width / height
    except (ValueError, ZeroDivisionError):
        ratio = math.nan
    if not 1 / _WIDEST <= ratio <= _WIDEST:
        raise ValueError(
            f"aspect_ratio is {text!r}: give width:height, such as 3:2, within 1:{_WIDEST:g} and {_WIDEST:g}:1"
        )
    return ratio


def size_of(ratio: float, short: int, multiple: int) -> tuple[int, int]:
    """(H, W) of a picture whose long side is a multiple of 8, as in IF.

    Args:
      ratio: width over height.
      short: the short side, in pixels.
      multiple: the long side is a multiple of this as well.
    """
    unit = math.lcm(8, multiple)
    long = max(round(short / unit * max(ratio, 1 / ratio)) * unit, short)
    return (short, long) if ratio >= 1 else (long, short)


def batch_of(pictures: np.ndarray, count: int, word: str) -> np.ndarray:
    """Pictures (B, H, W, C) as (count, H, W, C); ValueError where B is neither 1 nor count."""
    if len(pictures) not in (1, count):
        raise ValueError(f"{len(pictures)} pictures ({word}) for {count} prompts: give one, or one for each")
    return np.broadcast_to(pictures, (count, *pictures.shape[1:]))


def open_file(path: str | Path, widest: float = _WIDEST) -> Image.Image:
    """A picture file, decoded as it is stored.

    Args:
        path: of the file.
        widest: the longer side over the shorter one, at most.

    Raises:
        ValueError: for what is no picture, is damaged, empty, enormous or longer than that.
        FileNotFoundError: where there is no such file.
    """
    try:
        with open_picture(Path(path).read_bytes()) as picture:
            _check_size(str(path), picture.size, widest)
            picture.load()
            return picture
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; give a picture") from None
    except (UnidentifiedImageError, IsADirectoryError):
        raise ValueError(f"{path}: no picture that Pillow can read by itself; give a PNG, JPEG or WebP") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"{path}: the picture is enormous: make it smaller than {_LARGEST:,} pixels") from None
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path}: the picture is damaged ({error})") from None


def _check_size(word: str, size: tuple[int, int], widest: float = _WIDEST) -> None:
    width, height = size
    if min(size) < 1:
        raise ValueError(f"{word} is {width}x{height}: it has no pixels")
    if width * height > _LARGEST:
        raise ValueError(f"{word} is {width}x{height}: make it smaller than {_LARGEST:,} pixels")
    if max(size) > widest * min(size):
        raise ValueError(f"{word} is {width}x{height}: crop it to an aspect ratio within 1:{widest:g} and {widest:g}:1")
