"""For the API reference (mkdocs.yml): a field of a dataclass is documented by its comment, as this code base writes it.

The comment stands behind the field, or above it.
"""

from __future__ import annotations

import io
import tokenize
from collections.abc import Sequence

import griffe


class FieldComments(griffe.Extension):
    """Gives every field without a docstring its comment."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: object) -> None:
        """Called for every attribute that griffe has read."""
        if attr.docstring is not None or not attr.parent or not attr.parent.is_class or not attr.lineno:
            return
        lines = attr.lines_collection[attr.filepath]
        if text := comment(lines, attr.lineno - 1, attr.endlineno or attr.lineno):
            attr.docstring = griffe.Docstring(text.replace("*", r"\*"), parent=attr, lineno=attr.lineno)


def comment(lines: Sequence[str], start: int, end: int) -> str:
    """The comment of the field that stands in lines[start:end]; "" where it has none."""
    if behind := _trailing("\n".join(lines[start:end])):
        return _join(behind)
    first = start
    while first and _alone(lines[first - 1]):
        first -= 1
    return _join(lines[first:start])


def _alone(line: str) -> bool:
    return line.lstrip().startswith("#")


def _trailing(source: str) -> list[str]:
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source.strip()).readline))
    except tokenize.TokenError:  # the last line of a longer one
        return []
    return [token.string for token in tokens if token.type == tokenize.COMMENT]


def _join(comments: Sequence[str]) -> str:
    return " ".join(line.strip().lstrip("# ") for line in comments)
