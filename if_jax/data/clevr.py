"""Captions for CLEVR (Johnson et al. 2017), which has none: sentences composed of a scene's objects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from if_jax.data.preprocessing import Unusable

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

    Raises:
      Unusable: fields of different lengths, as TensorFlow Datasets' mock data has them: nothing true can be said.
    """
    if len({len(objects[field]) for field in FIELDS}) > 1:
        raise Unusable("objects whose fields differ in length")
    names = {"color": COLOURS, "material": MATERIALS, "shape": SHAPES, "size": SIZES, **(names or {})}
    words = {field: [names[field][int(i)] for i in objects[field]] for field in names}
    rows = list(zip(words["size"], words["color"], words["material"], words["shape"], strict=True))
    if not rows:
        return ("an empty scene",)
    by_shape = _counted(Counter((shape,) for *_, shape in rows))
    by_colour = _counted(Counter((colour, shape) for _, colour, _, shape in rows))
    told = [f"a scene with {_number(len(rows), 'object')}", _list(by_shape), _list(by_colour)]
    told.append(_list(_counted(Counter((colour, material, shape) for _, colour, material, shape in rows))))
    if len(rows) <= 4:
        told.append(_list(_counted(Counter(rows))))
    return tuple(dict.fromkeys([*told, *_relations(rows, np.asarray(objects["pixel_coords"], float))]))


def _relations(rows: list[tuple[str, ...]], seen: np.ndarray) -> list[str]:
    """How objects stand to each other that one can name without doubt, at most four sentences."""
    named = [" ".join((size, colour, material, shape)) for size, colour, material, shape in rows]
    alone = [i for i, name in enumerate(named) if named.count(name) == 1]
    found = []
    for a in alone:
        for b in alone:
            across, depth = seen[a, 0] - seen[b, 0], seen[a, 2] - seen[b, 2]
            if across < -_CLEAR:
                found.append(f"{_a(named[a])} left of {_a(named[b])}")
            elif across > _CLEAR:
                found.append(f"{_a(named[a])} right of {_a(named[b])}")
            if depth < -_NEARER:
                found.append(f"{_a(named[a])} in front of {_a(named[b])}")
            elif depth > _NEARER:
                found.append(f"{_a(named[a])} behind {_a(named[b])}")
    return found[:: max(1, -(-len(found) // 4))]


def _counted(counts: Counter[tuple[str, ...]]) -> list[str]:
    return [_number(count, " ".join(kind)) for kind, count in sorted(counts.items(), key=lambda item: -item[1])]


def _number(count: int, thing: str) -> str:
    return _a(thing) if count == 1 else f"{_NUMBERS[count] if count < len(_NUMBERS) else count} {thing}s"


def _a(thing: str) -> str:
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"


def _list(parts: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))
