"""For the API reference: a dataclass field is documented by the comment on its line, as this code base writes it."""

from __future__ import annotations

import io
import tokenize

import griffe


class FieldComments(griffe.Extension):
    """Gives every field without a docstring the comment that stands behind it."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: object) -> None:
        if attr.docstring is None and attr.parent and attr.parent.is_class and (text := comment(attr.source)):
            attr.docstring = griffe.Docstring(text[0].upper() + text[1:] + ".", parent=attr, lineno=attr.lineno)


def comment(source: str) -> str:
    """The comments of an assignment joined; "" where there are none."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return " ".join(token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT)
