"""Reading a folder of images with captions, where anything may be wrong with any file."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

METADATA = "metadata.jsonl"
_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"))


class Entry(NamedTuple):
    """One image with its caption, or with the problem found before opening it."""

    name: str  # as the user knows it, relative to the folder
    path: Path
    caption: str
    problem: str = ""


def list_pictures(source: Path) -> list[Entry]:
    """List a folder by its metadata.jsonl if there is one, else every image below it with the .txt beside it.

    Raises:
      ValueError: there is nothing to list.
    """
    listed = _by_metadata(source) if (source / METADATA).is_file() else _by_text_files(source)
    if not listed:
        raise ValueError(f"{str(source)!r} lists no image: add {METADATA} (file_name, text), or images with .txt files")
    return listed


def read_picture(entry: Entry, size: int) -> tuple[Image.Image | None, str]:
    """Open, turn upright, cut square about the centre and scale to `size`; or None and the reason why not.

    Transparent parts become white. Pictures are scaled down (Pillow's antialiased bicubic), never up.
    """
    problem = entry.problem or _problem(entry)
    if problem:
        return None, problem
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged metadata is no reason to refuse a readable picture, but
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # a bomb is
            with Image.open(entry.path) as stored:
                picture = _to_rgb(ImageOps.exif_transpose(stored))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return None, "too many pixels"
    except Exception:  # decoders raise whatever they stumble over in a damaged file; one file must not end a build
        return None, "unreadable image"
    side = min(picture.size)
    if side < size:
        return None, f"smaller than {size} px"
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    box = (left, top, left + side, top + side)
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=box), ""


def _problem(entry: Entry) -> str:
    if not entry.path.is_file():
        return "missing file"
    if entry.path.stat().st_size == 0:
        return "empty file"
    return "" if entry.caption else "no caption"


def _by_metadata(source: Path) -> list[Entry]:
    root = source.resolve()
    entries = []
    for number, line in enumerate((source / METADATA).read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            name, text = fields["file_name"], fields.get("text") or ""
            path = (source / name).resolve()
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError):
            entries.append(Entry(f"{METADATA} line {number}", source, "", "line is not {file_name, text}"))
            continue
        problem = "" if path.is_relative_to(root) else "outside the folder"
        entries.append(Entry(name, path, text.strip(), problem))
    return entries


def _by_text_files(source: Path) -> list[Entry]:
    images = (path for path in source.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    entries = []
    for path in sorted(images):
        text, problem = path.with_suffix(".txt"), ""
        try:
            caption = text.read_text(encoding="utf-8").strip() if text.is_file() else ""
        except (UnicodeDecodeError, OSError):
            caption, problem = "", "unreadable caption"
        entries.append(Entry(path.relative_to(source).as_posix(), path, caption, problem))
    return entries


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit grey, which Pillow would clip rather than scale
        return Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")
