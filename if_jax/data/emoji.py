"""Fluent 3D emoji (Microsoft, MIT) with their names: 3,000 captioned 256 px pictures, held out by what they show.

Pictures come from the npm package @lobehub/fluent-emoji-3d, names from emojibase-data (MIT), fetched by the user's own
npm into the cache folder; nothing of them is part of if_jax.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from if_jax.checkpoints.files import user_cache
from if_jax.data.patterns import expand_home
from if_jax.data.preprocessing import read_picture

PACKAGES = ("@lobehub/fluent-emoji-3d@1.1.0", "emojibase-data@17.0.0")
HELD_OUT = "held_out"
_HELD_OUT_SHARE = 20  # one caption base of so many
_SKIN = re.compile(r"[:,] (?:[a-z-]+ )*skin tone")
# Version 1.1.0 of the pictures has medium-light and medium at each other's code points, as its thumbs show, but not in
# these: technologists, and couples of every kind.
_MEDIUM_LIGHT, _MEDIUM = "1f3fc", "1f3fd"
_THUMBS = "1f44d"
_AS_NAMED = re.compile(r"1f46[bcd]-|1f48f-|1f491-|.*-200d-(1f4bb$|2764-|1f91d-)")
_MIXED_UP = re.compile(r"1f6b5-1f3f[b-f]")  # a cyclist whose five tones stand in an order of their own


class Emoji(NamedTuple):
    """One picture: its code points in hexadecimal, file and caption."""

    code: str
    path: Path
    caption: str


class EmojiSet(NamedTuple):
    """All emoji that have both a picture and a name, in the order of their codes."""

    folder: Path
    fingerprint: str
    splits: dict[str, list[Emoji]]  # "train", "held_out"
    left_out: dict[str, list[str]]


def open_emoji(source: str | Path | None = None) -> EmojiSet:
    """Pair pictures with names. An emoji in several skin tones is in one split with all of them.

    Args:
      source: folder in which npm installed the two packages; None: the cache folder, installed now if need be.

    Raises:
      FileNotFoundError: a package is not there, or npm is not.
    """
    folder = _fetch() if source is None else Path(expand_home(str(source)))
    pictures = _package(folder, "@lobehub/fluent-emoji-3d") / "assets"
    names = _names(json.loads((_package(folder, "emojibase-data") / "en" / "data.json").read_text(encoding="utf-8")))
    splits: dict[str, list[Emoji]] = {"train": [], HELD_OUT: []}
    left_out: dict[str, list[str]] = {}
    exchanged = _has_exchanged_tones(pictures)
    for path in sorted(pictures.glob("*.webp")):
        code = _code(path.stem)
        label = names.get(_exchange_tones(code) if exchanged else code)
        if label is None:
            left_out.setdefault("no name", []).append(path.name)
        elif exchanged and _MIXED_UP.fullmatch(code):
            left_out.setdefault("another skin tone than its name says", []).append(path.name)
        else:
            splits[HELD_OUT if is_held_out(label) else "train"].append(Emoji(path.stem, path, caption(label)))
    if not splits["train"]:
        raise FileNotFoundError(f"{str(pictures)!r} holds no emoji pictures: `npm install {' '.join(PACKAGES)}` there")
    known = repr([(row.code, row.path.stat().st_size, row.caption) for rows in splits.values() for row in rows])
    fingerprint = hashlib.sha256(known.encode()).hexdigest()
    return EmojiSet(folder, fingerprint, splits, left_out)


def caption(label: str) -> str:
    """A Unicode name as one would say it: "flag: Norway" is the flag of Norway, a skin tone follows a comma."""
    kind, colon, rest = label.partition(": ")
    if not colon:
        return label
    return f"{kind} of {rest}" if kind == "flag" else f"{kind} {rest}" if kind == "keycap" else f"{kind}, {rest}"


def is_held_out(label: str) -> bool:
    """Whether what an emoji shows, whatever its skin tones, is kept out of training."""
    base = _SKIN.sub("", label)
    return hashlib.sha256(base.encode()).digest()[0] % _HELD_OUT_SHARE == 0


def _has_exchanged_tones(pictures: Path) -> bool:
    """Whether the thumb that should be the lighter one of medium-light and medium is the darker one."""
    light, dark = (pictures / f"{_THUMBS}-{tone}.webp" for tone in (_MEDIUM_LIGHT, _MEDIUM))
    if not (light.is_file() and dark.is_file()):
        return False
    means = [np.asarray(read_picture(path.read_bytes())).mean() for path in (light, dark)]
    return bool(means[0] < means[1])


def _exchange_tones(code: str) -> str:
    """The code of what the picture at `code` shows."""
    if _AS_NAMED.match(code):
        return code
    other = {_MEDIUM_LIGHT: _MEDIUM, _MEDIUM: _MEDIUM_LIGHT}
    return "-".join(other.get(part, part) for part in code.split("-"))


def _fetch() -> Path:
    cache = user_cache()
    if cache is None:
        raise FileNotFoundError("there is no home to fetch the emoji to: set XDG_CACHE_HOME, or give --source")
    base = cache / "emoji"
    if all((base / "node_modules" / name.rpartition("@")[0]).is_dir() for name in PACKAGES):
        return base
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(
            f"the emoji come from npm, which is not installed: get {' and '.join(PACKAGES)} and give their folder "
            "with --source"
        )
    base.mkdir(parents=True, exist_ok=True)
    command = [npm, "install", "--prefix", str(base), "--no-save", "--ignore-scripts", "--no-audit", "--no-fund"]
    done = subprocess.run([*command, *PACKAGES], capture_output=True, text=True)
    if done.returncode:
        raise FileNotFoundError(f"npm could not fetch the emoji: {' '.join(done.stderr.split())[-300:]}")
    return base


def _package(folder: Path, name: str) -> Path:
    for place in (folder / "node_modules" / name, folder / name, folder / name.split("/")[-1]):
        if place.is_dir():
            return place
    raise FileNotFoundError(f"{str(folder)!r} has no package {name}: `npm install {' '.join(PACKAGES)}` there")


def _names(entries: list[dict[str, Any]]) -> dict[str, str]:
    """Code -> label, skin tones included."""
    return {_code(each["hexcode"]): each["label"] for entry in entries for each in (entry, *entry.get("skins", []))}


def _code(text: str) -> str:
    """Code points without the marks for a coloured picture and a flag's end, which the packages do not set alike."""
    parts = [part.lstrip("0") for part in text.lower().replace("_", "-").split("-")]
    return "-".join(part for part in parts if part not in ("fe0f", "e007f"))
