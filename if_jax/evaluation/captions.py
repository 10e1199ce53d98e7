"""Captions from the files people have: lines of text, JSON lines, COCO's own JSON; and which of them are asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

FORMS = "lines of text, JSON lines with a caption each, or COCO's captions JSON"
_KEYS = ("caption", "text", "prompt")


def read_captions(path: str | Path) -> list[str]:
    """All captions of a file, in its order; empty lines are passed over.

    Args:
      path: `.txt` (a caption a line), `.jsonl` (an object or a string a line; "caption", "text" or "prompt"), or
        `.json` (COCO's `{"annotations": [{"caption": …}, …]}`, or a list).

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it holds no captions, or none of these forms; the line is named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--captions {path} does not exist: give {FORMS}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text (byte {error.start}): give {FORMS}") from None
    captions: list[str]
    if path.suffix == ".json":
        content = _parsed(text, str(path))
        rows = content.get("annotations", []) if isinstance(content, dict) else content
        captions = [_caption(row, f"{path}: entry {i}") for i, row in enumerate(rows, 1)]
    elif path.suffix == ".jsonl":
        lines = [(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
        captions = [_caption(_parsed(line, f"{path}: line {i}"), f"{path}: line {i}") for i, line in lines]
    else:
        captions = text.splitlines()
    stripped = [caption.strip() for caption in captions if caption.strip()]
    if not stripped:
        raise ValueError(f"{path}: holds no captions: give {FORMS}")
    return stripped


def choose_captions(captions: Sequence[str], count: int, seed: int) -> list[str]:
    """A subset without repetition, in the order of the file: the same for the same file, count and seed.

    Args:
      captions: of a file.
      count: how many; all where the file holds no more.
      seed: of the choice.

    Raises:
      ValueError: count is below 1.
    """
    if count < 1:
        raise ValueError(f"--prompts is {count}: use 1 or more")
    if count >= len(captions):
        return list(captions)
    rows = np.random.default_rng(seed).choice(len(captions), count, replace=False)
    return [captions[int(row)] for row in np.sort(rows)]


def captions_sha256(captions: Sequence[str]) -> str:
    """Identity of a list of captions, hexadecimal."""
    return hashlib.sha256("\n".join(captions).encode()).hexdigest()


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: is no JSON ({error.msg}): give {FORMS}") from None


def _caption(row: Any, place: str) -> str:
    value = next((row[key] for key in _KEYS if key in row), None) if isinstance(row, dict) else row
    if not isinstance(value, str):
        raise ValueError(f"{place}: holds no caption under {', '.join(_KEYS)}: give {FORMS}")
    return value
