"""The fenced blocks of a page, and the commands of those that are for a shell."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

_BLOCK = re.compile(r"^#+ (?P<heading>[^\n]+)$|^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """One fenced block below its heading."""

    heading: str
    language: str
    text: str


def blocks(path: Path) -> list[Block]:
    """All fenced blocks with a language, in order."""
    rows, heading = [], ""
    for match in _BLOCK.finditer(path.read_text(encoding="utf-8")):
        heading = match["heading"] or heading
        if match["language"]:
            rows.append(Block(heading, match["language"], match["text"]))
    return rows


def commands(text: str) -> list[list[str]]:
    """The words of each command of a shell block: comments gone, continued lines joined, those joined by && apart."""
    rows: list[list[str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        command: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                command.append(word)
            elif command:
                rows.append(command)
                command = []
    return rows
