"""Scenes by task: captions true of what can be seen, labels exact, and nothing held out ever trained on."""

from __future__ import annotations

import re

import numpy as np
import pytest

from if_jax.scenes import grammar, sampling, sources, tasks
from if_jax.scenes.scene import Scene, as_numpy
from if_jax.text.captions import clean_caption

MANY, CHUNK = 1000, 8  # in chunks of one size there is one program to compile
_THING = re.compile(
    r"(an?|two|three|four|five|six)(?: (small|large))?(?: (red|orange|yellow|green|cyan|blue|purple|pink))?"
    r"(?: (rubber|metal))? (sphere|cube|cylinder)(s?)"
)
_NUMBER = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}

Sampled = list[tuple[Scene, int, str]]


@pytest.fixture(scope="module", params=[False, True], ids=["train", "held_out"])
def split(request: pytest.FixtureRequest) -> tuple[bool, Sampled]:
    sampled = []
    for chunk in np.arange(MANY).reshape(-1, CHUNK):
        batch, kinds = tasks.sample_tasks(chunk, 3, held_out=request.param)
        sampled += zip(as_numpy(batch), np.asarray(kinds).tolist(), strict=True)
    rows = [
        (scene, kind, tasks.caption(scene, kind, np.random.default_rng(i))) for i, (scene, kind) in enumerate(sampled)
    ]
    return request.param, rows


def test_what_is_held_out_is_never_in_training_and_always_in_the_other_split(split: tuple[bool, Sampled]) -> None:
    held_out, rows = split
    for scene, _, caption in rows:
        assert bool(tasks.novelties(scene)) == held_out, caption
        for colour, shape in tasks.HELD_OUT_KINDS:  # and asked for by name
            if f"{colour} {shape}" in tasks.novelties(scene):
                assert re.search(rf"{colour} (rubber |metal )?{shape}", caption)
    seen = {novelty for scene, *_ in rows for novelty in tasks.novelties(scene)}
    if held_out:
        assert {f"{colour} {shape}" for colour, shape in tasks.HELD_OUT_KINDS} | set(tasks.HELD_OUT_WORDS) <= seen


def test_captions_name_exactly_what_is_there(split: tuple[bool, Sampled]) -> None:
    _, rows = split
    for scene, kind, caption in rows:
        assert 0 < len(caption) <= 76 and caption == caption.lower()
        assert (tasks.TASKS[kind] == "text") == bool(grammar.word(scene))
        assert_names_exactly(scene, caption)
    for caption in {caption for *_, caption in rows[:150]}:
        assert clean_caption(caption) == caption


def assert_names_exactly(scene: Scene, caption: str) -> None:
    """The caption names every group once, with its number, nothing else, and no relation that does not hold."""
    sign = re.search(r"a sign that says ([a-z]+)", caption)
    assert (sign[1] if sign else "") == grammar.word(scene)
    rest = re.sub(r"a sign that says [a-z]+", "", caption)
    things = [match.groups() for match in _THING.finditer(rest)]
    groups = grammar.groups(scene)
    assert len(things) == len(groups), caption
    for number, size, colour, material, shape, plural in things:
        fits = [
            group
            for group in groups
            if group.shape == shape
            and colour in (None, group.colour)
            and size in (None, group.size)
            and material in (None, group.material)
        ]
        assert len(fits) == 1 and len(fits[0].slots) == _NUMBER[number], caption
        assert bool(plural) == (_NUMBER[number] > 1), caption
    if relation := re.search(r"left of|right of|in front of|behind", caption):
        first, second = (next(g for g in groups if g.shape == f[4] and f[2] in (None, g.colour)) for f in things)
        assert grammar.relation(first, second) == relation[0]


def test_pairs_differ_in_shape_and_colour_and_are_named_in_full() -> None:
    """Which words belong together is then all that tells one blob from another."""
    seen = set()
    for chunk in np.arange(160).reshape(-1, CHUNK):
        for number, scene in zip(chunk, as_numpy(tasks.sample_pairs(chunk, 3)), strict=True):
            caption = tasks.pair_caption(scene, np.random.default_rng(number))
            assert_names_exactly(scene, caption)
            assert len(caption) <= grammar.MAX_BYTES and clean_caption(caption) == caption
            assert not tasks.novelties(scene)
            groups = grammar.groups(scene)
            assert all(group.colour in caption for group in groups)
            if len(groups) == 2:
                assert groups[0].shape != groups[1].shape and groups[0].colour != groups[1].colour
                seen.add(tuple(len(group.slots) for group in groups))
    assert len(seen) == 9  # one to three of each, and seldom one group alone, where two found no place


def test_slots_are_marked_by_booleans() -> None:
    """Also where the scenes have no sign, which is then known before anything is traced."""
    for sample in (sampling.sample_scenes, tasks.sample_pairs, lambda *args: tasks.sample_tasks(*args)[0]):
        assert sample(np.arange(CHUNK), 3).valid.dtype == bool


def test_every_task_comes_up_and_counts_go_to_six(split: tuple[bool, Sampled]) -> None:
    _, rows = split
    kinds = np.asarray([kind for _, kind, _ in rows])
    assert (np.bincount(kinds, minlength=len(tasks.TASKS)) > MANY / len(tasks.TASKS) * 0.6).all()
    counting = {
        len(group.slots)
        for scene, kind, _ in rows
        if tasks.TASKS[kind] == "counting"
        for group in grammar.groups(scene)
    }
    assert counting == {1, 2, 3, 4, 5, 6}
    whole = [scene.valid.sum() == 2 for scene, kind, _ in rows if tasks.TASKS[kind] in ("two", "position", "binding")]
    assert np.mean(whole) > 0.97  # hardly ever is there no way to place both in sight


def test_nothing_named_is_hidden(split: tuple[bool, Sampled]) -> None:
    _, rows = split
    for scene, *_ in rows[:64]:
        shares, sign = map(np.asarray, tasks._shares(scene))
        assert (shares[scene.valid] > tasks.MIN_VISIBLE - 0.08).all()  # judged at another resolution
        assert (shares[~scene.valid] == 0).all() and sign > 0.9


def test_drawn_samples_carry_their_labels() -> None:
    first, again = (list(sources.draw("tasks", range(CHUNK), 1, 16, with_labels=True)) for _ in range(2))
    assert all(np.array_equal(a[0], b[0]) and a[1:] == b[1:] for a, b in zip(first, again, strict=True))
    for picture, _, labels in first:
        assert picture.shape == (16, 16, 3) and labels["task"] in tasks.TASKS and labels["held_out"] == []
        assert len(labels["visible"]) == len(labels["objects"])
