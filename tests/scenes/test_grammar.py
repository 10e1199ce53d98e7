"""Captions: what they say is true, complete and fit for stock pipelines. A parser of its own reads them here."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from drawn_scenes import draw_scenes

from if_jax.scenes import grammar, sampling
from if_jax.scenes.grammar import NamedGroup
from if_jax.scenes.scene import COLOURS, MATERIALS, RELATIONS, SHAPES, SIZES, Scene, as_numpy
from if_jax.text.captions import clean_caption

MANY = 20_000
_NUMBER = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
_THING = re.compile(
    r"(?P<number>an?|one|two|three|four|five|six)(?: (?P<size>small|large))?"
    r"(?: (?P<colour>red|orange|yellow|green|cyan|blue|purple|pink))?(?: (?P<material>rubber|metal))?"
    r" (?P<shape>sphere|cube|cylinder)(?P<plural>s?)"
)
_SIGN = re.compile(r"a sign (?:that says|saying|with the word) (?P<word>[a-z]+)")
_PURE_PAIRS = ({"red", "blue"}, {"red", "green"}, {"green", "blue"})
_RELATION = re.compile(r" (?:to the )?(?P<name>left of|right of|in front of|behind) ")


@pytest.fixture(scope="module")
def described() -> list[tuple[Scene, str]]:
    chunks = np.arange(MANY).reshape(-1, 4000)
    drawn = [scene for chunk in chunks for scene in as_numpy(sampling.sample_scenes(chunk, 11))]
    return [(scene, grammar.caption(scene, np.random.default_rng((11, i)))) for i, scene in enumerate(drawn)]


def test_captions_fit_stock_pipelines(described: list[tuple[Scene, str]]) -> None:
    captions = sorted({caption for _, caption in described})
    assert len(captions) > MANY // 4
    for caption in captions:
        assert 0 < len(caption.encode("ascii")) <= 76
        assert caption == caption.lower()
    for caption in captions[:: max(1, len(captions) // 1500)]:
        assert clean_caption(caption) == caption
    # Cleaning works word by word and at commas and ends: every word the grammar knows, and every start and end.
    for piece in {word for caption in captions for word in caption.split()} | _ends(captions):
        assert clean_caption(piece.strip(",")) == piece.strip(",")


def test_captions_are_true_and_complete(described: list[tuple[Scene, str]]) -> None:
    for scene, caption in described:
        word, things, _ = _read(caption)
        assert word == grammar.word(scene)
        named = [_matching(scene, thing) for thing in things]
        for thing, slots in zip(things, named, strict=True):
            assert len(slots) == _NUMBER[thing["number"]], caption
            assert bool(thing["plural"]) == (len(slots) > 1), caption
            vowel = (thing["size"] or thing["colour"] or thing["material"] or thing["shape"])[0] in "aeiou"
            assert thing["number"] != ("a" if vowel else "an"), caption
        assert sorted(itertools.chain(*named)) == list(np.flatnonzero(scene.valid)), caption


def test_relations_hold_on_the_floor_and_in_the_picture(described: list[tuple[Scene, str]]) -> None:
    names, beside = set(), []
    for i, (scene, caption) in enumerate(described):
        _, things, relation = _read(caption)
        if relation is None:
            continue
        names.add(relation)
        a, b = (scene.position[_matching(scene, thing)] for thing in things)
        if relation in ("in front of", "behind"):
            near, far = (a, b) if relation == "in front of" else (b, a)
            assert near[:, 1].max() < far[:, 1].min()
        elif scene.letters[0] < 0 and {thing["colour"] for thing in things} in _PURE_PAIRS:
            left, right = things if relation == "left of" else things[::-1]
            beside.append((i, left["colour"], right["colour"]))
    assert names == set(RELATIONS)
    assert len(beside) > 40
    for k in range(0, 40, 4):
        pictures = np.asarray(draw_scenes(np.asarray([i for i, *_ in beside[k : k + 4]]), 11, 64)) / 255.0
        for picture, (_, left, right) in zip(pictures, beside[k : k + 4], strict=True):
            assert _column(picture, left) < _column(picture, right)


def test_labels_count_what_is_there(described: list[tuple[Scene, str]]) -> None:
    opposite = dict(zip(RELATIONS, ("right of", "left of", "behind", "in front of"), strict=True))
    for scene, _ in described[:2000]:
        labels = grammar.labels(scene)
        slots = np.flatnonzero(scene.valid)
        kinds = [f"{COLOURS[scene.colour[s]]} {SHAPES[scene.shape[s]]}" for s in slots]
        assert labels["counts"] == {kind: kinds.count(kind) for kind in kinds}
        assert [f"{item['colour']} {item['shape']}" for item in labels["objects"]] == kinds
        assert labels["colours"] == sorted({kind.split()[0] for kind in kinds})
        assert (labels["word"] or "") == grammar.word(scene)
        held = {tuple(relation) for relation in labels["relations"]}
        assert {(b, opposite[name], a) for a, name, b in held} == held


def test_short_prompts_of_users_are_in_the_grammar(described: list[tuple[Scene, str]]) -> None:
    captions = {caption for _, caption in described}
    for pattern in (
        r"two \w+ spheres and a \w+ cube",
        r"a large \w+ metal cylinder",
        r"three \w+ cubes",
        r"a \w+ sphere left of a \w+ cube",
        r"a \w+ cube to the right of a \w+ \w+",
        r"a sign that says \w+ and a \w+ sphere",
        r"a sign that says \w+",
        r"an orange \w+",
        r"two spheres",
    ):
        assert any(re.fullmatch(pattern, caption) for caption in captions), pattern


def test_the_longest_groups_still_fit() -> None:
    """Every number of objects in up to three groups, in the longest words, with the longest word on the sign."""
    counts = [c for c in itertools.product(range(1, 7), range(6), range(6)) if sum(c) <= 6 and (c[1] or not c[2])]
    for count in counts:
        for letters in ("", "hello") if sum(count) <= 3 and not count[2] else ("",):
            scene = _longest(count, letters)
            for i in range(30):
                caption = grammar.caption(scene, np.random.default_rng(i))
                assert len(caption) <= 76 and _read(caption)[0] == letters
                assert sum(_NUMBER[thing["number"]] for thing in _read(caption)[1]) == sum(count)


def test_a_scene_too_rich_for_a_caption_is_refused() -> None:
    with pytest.raises(ValueError, match="no caption of 76 bytes"):
        grammar.caption(_longest((2, 2, 2), "hello"), np.random.default_rng(0))


def test_the_parser_reads_what_captions_say(described: list[tuple[Scene, str]]) -> None:
    for _, caption in described:
        word, things, relation = _read(caption)
        parsed = grammar.parse_caption(caption)
        named = [(_NUMBER[thing["number"]], *map(thing.get, NamedGroup._fields[1:])) for thing in things]
        assert list(parsed.groups) == named, caption
        assert (parsed.word, parsed.relation) == (word, relation if len(things) == 2 else None), caption
        assert all(_THING.fullmatch(caption[start:end]) for start, end in parsed.spans), caption


def test_the_parser_word_by_word() -> None:
    parsed = grammar.parse_caption("a photo of two small cubes to the left of an orange metal cylinder")
    assert parsed.groups == (NamedGroup(2, "cube", size="small"), NamedGroup(1, "cylinder", "orange", material="metal"))
    assert (parsed.relation, parsed.word) == ("left of", "")
    parsed = grammar.parse_caption("a sign that says moon and six red spheres")
    assert (parsed.groups, parsed.relation, parsed.word) == ((NamedGroup(6, "sphere", "red"),), None, "moon")
    assert grammar.parse_caption("an empty floor") == ((), (), None, "")


def _read(caption: str) -> tuple[str, list[dict], str | None]:
    """Word on the sign ("" if none), the things named, and the relation between the two groups."""
    text = re.sub(r"^(a picture of|a photo of|an image of) ", "", caption)
    sign = _SIGN.search(text)
    text = _SIGN.sub("", text).removesuffix(" in front of ").strip(", ")
    text = re.sub(r"^and |(?:,| and)$", "", text).strip(", ").removesuffix(" and").removesuffix(" in front of")
    relation = _RELATION.search(text)
    parts = [part for part in re.split(r", | and |" + _RELATION.pattern.replace("?P<name>", "?:"), text) if part]
    things = [_THING.fullmatch(part) for part in parts]
    assert all(things), caption
    return sign["word"] if sign else "", [thing.groupdict() for thing in things], relation and relation["name"]


def _matching(scene: Scene, thing: dict) -> list[int]:
    kinds = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "material": MATERIALS}
    fits = scene.valid.copy()
    for field, names in kinds.items():
        if thing[field]:
            fits &= getattr(scene, field) == names.index(thing[field])
    return list(np.flatnonzero(fits))


def _column(picture: np.ndarray, colour: str) -> float:
    """Mean column of the pixels of a pure colour."""
    channel = {"red": 0, "green": 1, "blue": 2}[colour]
    shown = picture[..., channel] - np.delete(picture, channel, axis=-1).max(-1) > 0.15
    return float(np.nonzero(shown)[1].mean())


def _ends(captions: list[str]) -> set[str]:
    return {" ".join(caption.split()[:3]) for caption in captions} | {caption.split()[-1] for caption in captions}


def _longest(count: tuple[int, ...], letters: str) -> Scene:
    group = np.repeat(np.arange(3), count)
    slots = np.zeros(6, np.int32)
    slots[: len(group)] = group
    place = np.stack([np.arange(6) - 2.5, np.arange(6) % 2], axis=-1).astype(np.float32)
    return Scene(
        valid=np.arange(6) < len(group),
        group=slots,
        shape=np.full(6, SHAPES.index("cylinder")),
        colour=np.asarray([COLOURS.index(c) for c in ("yellow", "orange", "purple")])[slots],
        size=np.zeros(6, np.int32),
        material=np.zeros(6, np.int32),
        position=place,
        yaw=np.zeros(6, np.float32),
        letters=np.asarray([ord(c) - 97 for c in letters] + [-1] * (5 - len(letters))),
        sign_x=np.float32(0),
        tone=np.float32(1),
    )
