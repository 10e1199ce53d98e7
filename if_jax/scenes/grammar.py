"""The words of the scenes: captions, always true and complete, labels for counting and checking, and the parser.

A caption names every group of like objects with its exact number, sometimes size, material or how two groups stand
to each other, and the word on the sign. It is lower-case ASCII, at most 76 bytes (77 tokens with the end mark), and
IF's caption cleaning leaves it as it is. `parse_caption` reads back what any such caption says.
"""

from __future__ import annotations

import re
import string
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from if_jax.scenes.geometry import middle_height, project, to_pixels
from if_jax.scenes.scene import COLOURS, MATERIALS, NUMBERS, RELATIONS, SHAPES, SIZES, Scene

MAX_BYTES = 76
OPPOSITE = {"left of": "right of", "right of": "left of", "in front of": "behind", "behind": "in front of"}
_MARGIN = 0.3  # floor units (the picture is about five wide) by which a relation must hold to be spoken of
_SIGN_WORDINGS = ("a sign that says {}", "a sign saying {}", "a sign with the word {}")

_ANY = "|".join
_GROUP = re.compile(
    rf"\b(?P<number>an?|{_ANY(NUMBERS[1:])}) (?:(?P<size>{_ANY(SIZES)}) )?(?:(?P<colour>{_ANY(COLOURS)}) )?"
    rf"(?:(?P<material>{_ANY(MATERIALS)}) )?(?P<shape>{_ANY(SHAPES)})s?\b"
)
_RELATION = re.compile(rf" ({_ANY(RELATIONS)}) ")
_SIGN = re.compile(rf"\b(?:{_ANY(wording.removeprefix('a ').format('') for wording in _SIGN_WORDINGS)})(\w+)")


class Group(NamedTuple):
    """Objects of a scene that are alike in everything but position."""

    shape: str
    colour: str
    size: str
    material: str
    slots: tuple[int, ...]
    right: tuple[float, ...]  # where each is seen, left to right, floor units at the picture's middle
    away: tuple[float, ...]  # distance of each from the camera's side of the floor, floor units


class NamedGroup(NamedTuple):
    """A group as a caption names it; an attribute that is not named is None."""

    number: int
    shape: str
    colour: str | None = None
    size: str | None = None
    material: str | None = None


class ParsedCaption(NamedTuple):
    """What a caption says."""

    groups: tuple[NamedGroup, ...]  # in the order they are named
    spans: tuple[tuple[int, int], ...]  # of each group's words: first character, and the one after the last
    relation: str | None  # of the first of two groups to the second
    word: str  # on the sign; "" without a sign


def parse_caption(caption: str) -> ParsedCaption:
    """Read back what a caption of the scenes' grammar says.

    Args:
      caption: as `caption`, `tasks.caption` or `tasks.pair_caption` word it; words they do not use are passed over.

    Returns:
      The groups it names, the relation between the two where there are two, and the word on the sign.
    """
    matches = list(_GROUP.finditer(caption))
    groups = [
        NamedGroup(NUMBERS.index(number) if number in NUMBERS else 1, shape, colour, size, material)
        for number, size, colour, material, shape in (match.groups() for match in matches)
    ]
    relation = _RELATION.search(caption) if len(groups) == 2 else None
    sign = _SIGN.search(caption)
    spans = tuple(match.span() for match in matches)
    return ParsedCaption(tuple(groups), spans, relation[1] if relation else None, sign[1] if sign else "")


def groups(scene: Scene) -> list[Group]:
    """The groups of a scene on the host, in slot order."""
    slots: dict[int, list[int]] = {}
    for slot in np.flatnonzero(scene.valid):
        slots.setdefault(int(scene.group[slot]), []).append(int(slot))
    return [_group(scene, of_group) for of_group in slots.values()]


def word(scene: Scene) -> str:
    """The word on the sign in lower case, "" without a sign."""
    return "".join(string.ascii_lowercase[i] for i in scene.letters if i >= 0)


def relation(a: Group, b: Group) -> str | None:
    """How all of `a` stand to all of `b`, by the more evident direction; None where nothing holds clearly."""
    gaps = _gaps(a, b)
    best = max(gaps, key=gaps.__getitem__)
    return best if gaps[best] > _MARGIN else None


def labels(scene: Scene) -> dict[str, Any]:
    """What is in the picture, as plain JSON values.

    Args:
      scene: one scene on the host.

    Returns:
      objects: shape, colour, size, material, group number, floor position and `seen` (column, row of the middle as
      shares of the picture); counts: "red sphere" -> 2; colours; relations: [group a, relation, group b]; word or None.
    """
    present = groups(scene)
    objects = [_object(scene, number, group, slot) for number, group in enumerate(present) for slot in group.slots]
    counts: dict[str, int] = {}
    for group in present:
        kind = f"{group.colour} {group.shape}"
        counts[kind] = counts.get(kind, 0) + len(group.slots)
    pairs = [(a, b) for a in range(len(present)) for b in range(len(present)) if a != b]
    relations = [[a, name, b] for a, b in pairs for name, gap in _gaps(present[a], present[b]).items() if gap > _MARGIN]
    return {
        "objects": objects,
        "counts": counts,
        "colours": sorted({group.colour for group in present}),
        "relations": relations,
        "word": word(scene) or None,
    }


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Describe a scene; too long a wording gives way to a plainer one.

    Args:
      scene: one scene on the host.
      rng: picks the wording.

    Returns:
      At most `MAX_BYTES` of lower-case ASCII.

    Raises:
      ValueError: even the plainest wording is too long, which no sampled scene is.
    """
    present = groups(scene)
    rng.shuffle(present)
    related = relation(*present) if len(present) == 2 and rng.random() < 0.55 else None
    colourless = len({g.shape for g in present}) == len(present) and rng.random() < 0.05
    rich = [_rich_phrase(g, rng, colourless) for g in present]
    plain = [phrase(g, {"colour"}) for g in present]
    start = str(rng.choice(("a picture of ", "a photo of ", "an image of "))) if rng.random() < 0.12 else ""
    to_the = "to the " if related in ("left of", "right of") and rng.random() < 0.5 else ""
    sign, sign_place = _sign(word(scene), rng), rng.random()
    attempts = (
        start + _join(rich, related and to_the + related, sign, sign_place),
        _join(rich, related, sign, sign_place),
        _join(rich, None, sign, sign_place),
        _join(plain, related, sign, sign_place),
        _join(plain, None, sign, 1.0),
    )
    for text in attempts:
        if len(text) <= MAX_BYTES:
            return text
    raise ValueError(f"no caption of {MAX_BYTES} bytes names everything in this scene: {attempts[-1]!r}")


def phrase(group: Group, fields: Collection[str], number: str = "") -> str:
    """A group in words, "two large red spheres".

    Args:
      group: what to name.
      fields: which of "size", "colour" and "material" are named.
      number: the word to begin with, in place of the article or the number of objects.

    Returns:
      The phrase, as `parse_caption` reads it.
    """
    words = [getattr(group, field) for field in ("size", "colour", "material") if field in fields] + [group.shape]
    if len(group.slots) > 1:
        return f"{number or NUMBERS[len(group.slots)]} {' '.join(words)}s"
    return f"{number} {' '.join(words)}" if number else with_article(" ".join(words))


def with_article(noun: str) -> str:
    """ "a cube", "an orange cube"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def join_list(parts: Sequence[str]) -> str:
    """ "a, b and c"; "" of nothing."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))


def _group(scene: Scene, slots: list[int]) -> Group:
    first = slots[0]
    return Group(
        shape=SHAPES[scene.shape[first]],
        colour=COLOURS[scene.colour[first]],
        size=SIZES[scene.size[first]],
        material=MATERIALS[scene.material[first]],
        slots=tuple(slots),
        right=tuple(_seen(scene, slot)[0] for slot in slots),
        away=tuple(float(scene.position[slot][1]) for slot in slots),
    )


def _seen(scene: Scene, slot: int) -> tuple[float, float]:
    x, y = (float(value) for value in scene.position[slot])
    return project(x, y, middle_height(int(scene.size[slot])))


def _object(scene: Scene, number: int, group: Group, slot: int) -> dict[str, Any]:
    column, row = to_pixels(_seen(scene, slot), 1)
    return {
        **{name: getattr(group, name) for name in ("shape", "colour", "size", "material")},
        "group": number,
        "floor": [round(float(value), 4) for value in scene.position[slot]],
        "seen": [round(column, 4), round(row, 4)],
    }


def _gaps(a: Group, b: Group) -> dict[str, float]:
    return {
        "left of": min(b.right) - max(a.right),
        "right of": min(a.right) - max(b.right),
        "in front of": min(b.away) - max(a.away),
        "behind": min(a.away) - max(b.away),
    }


def _rich_phrase(group: Group, rng: np.random.Generator, colourless: bool) -> str:
    """ "a large red metal sphere": sometimes with size or material, seldom "one" for the article."""
    draw = rng.random()
    fields = set() if colourless else {"colour"}
    fields |= {"size"} if draw < 0.25 else set()
    fields |= {"material"} if draw < 0.1 or 0.25 <= draw < 0.4 else set()
    return phrase(group, fields, "one" if len(group.slots) == 1 and rng.random() < 0.08 else "")


def _sign(text: str, rng: np.random.Generator) -> str:
    return _SIGN_WORDINGS[int(rng.choice(3, p=(0.8, 0.12, 0.08)))].format(text) if text else ""


def _join(phrases: list[str], related: str | None, sign: str, sign_place: float) -> str:
    """The sentence without a full stop; `sign_place` in [0, 1) chooses where the sign is named."""
    body = [f" {related} ".join(phrases)] if related else phrases
    if not sign:
        return join_list(body) or "an empty floor"
    if body and len(phrases) == 1 and sign_place < 0.15:
        return f"{body[0]} in front of {sign}"
    return join_list([sign, *body] if sign_place < 0.5 else [*body, sign])
