"""The words of the scenes: captions, always true and complete, and labels for counting and checking.

A caption names every group of like objects with its exact number, sometimes size, material or how two groups stand
to each other, and the word on the sign. It is lower-case ASCII, at most 76 bytes (77 tokens with the end mark), and
IF's caption cleaning leaves it as it is.
"""

from __future__ import annotations

import string
from typing import NamedTuple

import numpy as np

from if_jax.scenes.geometry import middle_height, project, to_pixels
from if_jax.scenes.scene import COLOURS, MATERIALS, NUMBERS, SHAPES, SIZES, Scene

MAX_BYTES = 76
_MARGIN = 0.3  # floor units (the picture is about five wide) by which a relation must hold to be spoken of


class Group(NamedTuple):
    """Objects alike in everything but place."""

    shape: str
    colour: str
    size: str
    material: str
    slots: tuple[int, ...]
    right: tuple[float, ...]  # where each is seen, left to right, floor units at the picture's middle
    away: tuple[float, ...]  # distance of each from the camera's side of the floor, floor units


def groups(scene: Scene) -> list[Group]:
    """The groups of a scene on the host, in slot order."""
    found: dict[int, list[int]] = {}
    for slot in np.flatnonzero(scene.valid):
        found.setdefault(int(scene.group[slot]), []).append(int(slot))
    return [_group(scene, slots) for slots in found.values()]


def word(scene: Scene) -> str:
    """The word on the sign in lower case, "" without a sign."""
    return "".join(string.ascii_lowercase[i] for i in scene.letters if i >= 0)


def relation(a: Group, b: Group) -> str | None:
    """How all of `a` stand to all of `b`, by the more evident direction; None where nothing holds clearly."""
    gaps = _gaps(a, b)
    best = max(gaps, key=gaps.__getitem__)
    return best if gaps[best] > _MARGIN else None


def labels(scene: Scene) -> dict:
    """What is in the picture, as plain JSON values.

    objects: shape, colour, size, material, group number, floor position and `seen` (column, row of the middle as
    shares of the picture); counts: "red sphere" -> 2; relations: [group a, relation, group b]; word or None.
    """
    found = groups(scene)
    objects = [_object(scene, number, group, slot) for number, group in enumerate(found) for slot in group.slots]
    counts: dict[str, int] = {}
    for group in found:
        kind = f"{group.colour} {group.shape}"
        counts[kind] = counts.get(kind, 0) + len(group.slots)
    pairs = [(a, b) for a in range(len(found)) for b in range(len(found)) if a != b]
    relations = [[a, name, b] for a, b in pairs for name, gap in _gaps(found[a], found[b]).items() if gap > _MARGIN]
    colours = sorted({group.colour for group in found})
    return {
        "objects": objects,
        "counts": counts,
        "colours": colours,
        "relations": relations,
        "word": word(scene) or None,
    }


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Describe a scene; `rng` picks the wording. Too long a wording gives way to a plainer one."""
    found = groups(scene)
    rng.shuffle(found)
    related = relation(*found) if len(found) == 2 and rng.random() < 0.55 else None
    colourless = len({g.shape for g in found}) == len(found) and rng.random() < 0.05
    rich = [_phrase(g, rng, colourless) for g in found]
    plain = [_phrase(g, None, False) for g in found]
    start = str(rng.choice(("a picture of ", "a photo of ", "an image of "))) if rng.random() < 0.12 else ""
    to_the = "to the " if related in ("left of", "right of") and rng.random() < 0.5 else ""
    sign, place = _sign(word(scene), rng), rng.random()
    attempts = (
        start + _join(rich, related and to_the + related, sign, place),
        _join(rich, related, sign, place),
        _join(rich, None, sign, place),
        _join(plain, related, sign, place),
        _join(plain, None, sign, 1.0),
    )
    for text in attempts:
        if len(text) <= MAX_BYTES:
            return text
    raise ValueError(f"no caption of {MAX_BYTES} bytes names everything in this scene: {attempts[-1]!r}")


def _group(scene: Scene, slots: list[int]) -> Group:
    first = slots[0]
    seen = [_seen(scene, slot)[0] for slot in slots]
    return Group(
        shape=SHAPES[scene.shape[first]],
        colour=COLOURS[scene.colour[first]],
        size=SIZES[scene.size[first]],
        material=MATERIALS[scene.material[first]],
        slots=tuple(slots),
        right=tuple(seen),
        away=tuple(float(scene.position[slot][1]) for slot in slots),
    )


def _seen(scene: Scene, slot: int) -> tuple[float, float]:
    x, y = (float(value) for value in scene.position[slot])
    return project(x, y, middle_height(int(scene.size[slot])))


def _object(scene: Scene, number: int, group: Group, slot: int) -> dict:
    column, row = to_pixels(_seen(scene, slot), 1)
    return {
        "shape": group.shape,
        "colour": group.colour,
        "size": group.size,
        "material": group.material,
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


def _phrase(group: Group, rng: np.random.Generator | None, colourless: bool) -> str:
    """ "a large red metal sphere"; without `rng` the plainest wording, "a red sphere"."""
    draw = rng.random() if rng is not None else 1.0
    words = [group.size] if draw < 0.25 else []
    words += [] if colourless else [group.colour]
    words += [group.material] if draw < 0.1 or 0.25 <= draw < 0.4 else []
    count = len(group.slots)
    if count > 1:
        return " ".join([NUMBERS[count], *words, group.shape + "s"])
    article = "an" if (words + [group.shape])[0][0] in "aeiou" else "a"
    if rng is not None and rng.random() < 0.08:
        article = "one"
    return " ".join([article, *words, group.shape])


def _sign(text: str, rng: np.random.Generator) -> str:
    if not text:
        return ""
    wordings = ("a sign that says {}", "a sign saying {}", "a sign with the word {}")
    return wordings[int(rng.choice(3, p=(0.8, 0.12, 0.08)))].format(text)


def _join(phrases: list[str], related: str | None, sign: str, sign_place: float) -> str:
    """One sentence without a full stop; `sign_place` in [0, 1) chooses where the sign is named."""
    body = [f" {related} ".join(phrases)] if related else phrases
    if not sign:
        return _list(body) or "an empty floor"
    if body and len(phrases) == 1 and sign_place < 0.15:
        return f"{body[0]} in front of {sign}"
    return _list([sign, *body] if sign_place < 0.5 else [*body, sign])


def _list(parts: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))
