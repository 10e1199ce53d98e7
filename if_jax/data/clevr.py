"""Captions for CLEVR (Johnson et al. 2017), which has none: sentences composed of a scene's objects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from if_jax.data.preprocessing import UnusableRecord
from if_jax.scenes.grammar import join_list, with_article

COLOURS = ("gray", "blue", "brown", "yellow", "red", "green", "purple", "cyan")  # in TensorFlow Datasets' order
SHAPES = ("cube", "sphere", "cylinder")
SIZES = ("small", "large")
MATERIALS = ("rubber", "metal")
FIELDS = ("color", "material", "shape", "size", "pixel_coords")  # of `objects` in TensorFlow Datasets' schema
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_CLEAR = 30.0  # pixels of CLEVR's 480 px wide pictures by which objects must lie apart to be called left or right
_NEARER = 1.0  # units of depth by which one must be nearer to the camera to be called in front


def captions(objects: Mapping[str, Any], names: Mapping[str, tuple[str, ...]] | None = None) -> tuple[str, ...]:
    """True sentences about one scene, from plain counts to two objects' relation; IF was trained on such.

    Args:
      objects: one sequence per field, all equally long: class numbers, and pixel_coords (column, row, depth).
      names: words of the class numbers by field, where they are not TensorFlow Datasets' order.

    Returns:
      The sentences, no two alike, plainer ones first.

    Raises:
      UnusableRecord: fields of different lengths, as TensorFlow Datasets' mock data has them: nothing true can be said.
    """
    if len({len(objects[field]) for field in FIELDS}) > 1:
        raise UnusableRecord("objects whose fields differ in length")
    names = {"color": COLOURS, "material": MATERIALS, "shape": SHAPES, "size": SIZES, **(names or {})}
    words = {field: [names[field][int(i)] for i in objects[field]] for field in names}
    rows = list(zip(words["size"], words["color"], words["material"], words["shape"], strict=True))
    if not rows:
        return ("an empty scene",)
    by_shape = _counted(Counter((shape,) for *_, shape in rows))
    by_colour = _counted(Counter((colour, shape) for _, colour, _, shape in rows))
    by_look = _counted(Counter((colour, material, shape) for _, colour, material, shape in rows))
    sentences = [f"a scene with {_number(len(rows), 'object')}", *map(join_list, (by_shape, by_colour, by_look))]
    if len(rows) <= 4:
        sentences.append(join_list(_counted(Counter(rows))))
    return tuple(dict.fromkeys([*sentences, *_relations(rows, np.asarray(objects["pixel_coords"], float))]))


def _relations(rows: list[tuple[str, ...]], seen: np.ndarray) -> list[str]:
    """How objects stand to each other that one can name without doubt, at most four sentences."""
    named = [with_article(" ".join(words)) for words in rows]
    alone = [i for i, name in enumerate(named) if named.count(name) == 1]
    sentences = []
    for a in alone:
        for b in alone:
            across, depth = seen[a, 0] - seen[b, 0], seen[a, 2] - seen[b, 2]
            for gap, least, below, above in (
                (across, _CLEAR, "left of", "right of"),
                (depth, _NEARER, "in front of", "behind"),
            ):
                if abs(gap) > least:
                    sentences.append(f"{named[a]} {below if gap < 0 else above} {named[b]}")
    return sentences[:: max(1, -(-len(sentences) // 4))]


def _counted(counts: Counter[tuple[str, ...]]) -> list[str]:
    return [_number(count, " ".join(kind)) for kind, count in sorted(counts.items(), key=lambda item: -item[1])]


def _number(count: int, thing: str) -> str:
    return with_article(thing) if count == 1 else f"{_NUMBERS[count] if count < len(_NUMBERS) else count} {thing}s"
