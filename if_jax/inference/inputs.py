"""Pictures and masks of users, in whatever form they come, as arrays of the size that a stage draws at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from if_jax.diffusion import augment

Picture = Image.Image | np.ndarray | str | Path  # arrays: (H, W, 3) in [-1, 1]
_WIDEST = 8.0  # aspect ratio
_LARGEST = 100_000_000  # pixels


def read_picture(given: Picture, word: str = "image") -> Image.Image | np.ndarray:
    """A picture as 8-bit RGB, upright; or, where an array (H, W, 3) in [-1, 1] is given, that array in float32.

    Alpha is laid over white, 16 bits become 8, palettes and other colour spaces RGB, and EXIF rotation is carried out.
    Raises ValueError for what is no picture, is empty or is enormous; FileNotFoundError where there is no such file.
    """
    if isinstance(given, str | Path):
        given = _open(given)
    if isinstance(given, Image.Image):
        _check_size(word, given.size)
        return _rgb(ImageOps.exif_transpose(given))
    array = np.asarray(given)
    if array.ndim != 3 or array.shape[-1] != 3 or not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"{word} is an array of {array.dtype} {array.shape}: give a picture (PIL or a file), or floats (H, W, 3) in"
            " [-1, 1]"
        )
    _check_size(word, array.shape[1::-1])
    if not np.isfinite(array).all():
        raise ValueError(f"{word} holds values that are not finite: give floats in [-1, 1]")
    return array.astype(np.float32)


def read_mask(given: Picture, size: tuple[int, int], word: str = "mask") -> Image.Image:
    """A mask as 8-bit grey, white where to draw; `size` (width, height) is that of its picture.

    An array (H, W) or (H, W, 1) is bool or in [0, 1]. Raises ValueError where the two sizes differ.
    """
    if isinstance(given, str | Path):
        given = _open(given)
    if isinstance(given, Image.Image):
        mask = _rgb(ImageOps.exif_transpose(given), "black").convert("L")
    else:
        array = np.asarray(given)
        array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
        if array.ndim != 2 or not (array.dtype == bool or np.issubdtype(array.dtype, np.number)):
            raise ValueError(f"{word} is an array of {array.dtype} {array.shape}: give (H, W), 0 to keep and 1 to draw")
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError(f"{word} holds values outside [0, 1]: 0 keeps, 1 draws")
        mask = Image.fromarray(np.rint(array.astype(np.float32) * 255).astype(np.uint8))
    if mask.size != size:
        raise ValueError(
            f"{word} is {mask.size[0]}x{mask.size[1]} and its picture {size[0]}x{size[1]}: make them the same size"
        )
    return mask


def picture_size(picture: Image.Image | np.ndarray) -> tuple[int, int]:
    """(width, height)."""
    return picture.size if isinstance(picture, Image.Image) else picture.shape[1::-1]


def fit_picture(picture: Image.Image | np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) float32 in [-1, 1] by bicubic resampling; arrays that fit already stay as they are. size (H, W)."""
    if isinstance(picture, Image.Image):
        resized = picture.resize(size[::-1], Image.Resampling.BICUBIC, reducing_gap=None)
        return np.asarray(resized, np.float32) / 127.5 - 1.0
    if picture.shape[:2] == size:
        return picture
    return np.asarray(augment.downsample(jnp.asarray(picture)[None], size)[0])


def fit_mask(mask: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 1) float32, 1 where to draw; resampled bicubic and cut at a half, as diffusers does."""
    resized = mask.resize(size[::-1], Image.Resampling.BICUBIC, reducing_gap=None)
    return (np.asarray(resized, np.float32)[..., None] / 255 >= 0.5).astype(np.float32)


def parse_aspect_ratio(text: str) -> float:
    """Width over height of "3:2"; ValueError where that is none."""
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
    """(H, W) of a picture with that short side; the long side is a multiple of 8, as in IF, and of `multiple`.

    ratio: width over height.
    """
    unit = math.lcm(8, multiple)
    long = max(round(short / unit * max(ratio, 1 / ratio)) * unit, short)
    return (short, long) if ratio >= 1 else (long, short)


def batch_of(pictures: Sequence[np.ndarray], count: int, word: str) -> np.ndarray:
    """One picture for all of `count` prompts, or one for each: (count, H, W, C)."""
    if len(pictures) not in (1, count):
        raise ValueError(f"{len(pictures)} pictures ({word}) for {count} prompts: give one, or one for each")
    stacked = np.stack(pictures)
    return np.broadcast_to(stacked, (count, *stacked.shape[1:]))


def as_list(given: Any) -> list[Any]:
    """A single picture as a list of one."""
    return list(given) if isinstance(given, list | tuple) else [given]


def _open(path: str | Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            _check_size(str(path), picture.size)
            picture.load()
            return picture
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; give a picture") from None
    except (UnidentifiedImageError, IsADirectoryError):
        raise ValueError(f"{path}: no picture that Pillow can read; give a PNG, JPEG or WebP") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"{path}: the picture is enormous: make it smaller than {_LARGEST:,} pixels") from None
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path}: the picture is damaged ({error})") from None


def _check_size(word: str, size: tuple[int, int]) -> None:
    width, height = size
    if min(size) < 1:
        raise ValueError(f"{word} is {width}x{height}: it has no pixels")
    if width * height > _LARGEST:
        raise ValueError(f"{word} is {width}x{height}: make it smaller than {_LARGEST:,} pixels")
    if max(size) > _WIDEST * min(size):
        raise ValueError(
            f"{word} is {width}x{height}: crop it to an aspect ratio within 1:{_WIDEST:g} and {_WIDEST:g}:1"
        )


def _rgb(picture: Image.Image, background: str = "white") -> Image.Image:
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        values = np.asarray(picture, np.float32)
        top = 65535.0 if values.max(initial=0) > 255 or picture.mode.startswith("I;16") else 255.0
        picture = Image.fromarray(np.rint(np.clip(values / top, 0, 1) * 255).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        under = Image.new("RGBA", picture.size, background)
        picture = Image.alpha_composite(under, picture)
    return picture.convert("RGB")
