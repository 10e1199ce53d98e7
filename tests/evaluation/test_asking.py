"""What captions promise, read back from their words."""

from __future__ import annotations

import numpy as np
import pytest

from if_jax.data import grammar, scenes, tasks
from if_jax.evaluation import asking
from if_jax.evaluation.asking import Wanted


@pytest.fixture(scope="module")
def drawn():
    return asking.prompts(63, 3)


def test_captions_are_read_word_by_word():
    one = asking.ask("a photo of two small cubes to the left of an orange metal cylinder")
    assert one.wanted == (Wanted(2, "cube", size="small"), Wanted(1, "cylinder", "orange", material="metal"))
    assert one.relation == "left of" and one.word == "" and not one.coloured
    one = asking.ask("a sign that says moon and six red spheres")
    assert (one.word, one.wanted, one.relation) == ("moon", (Wanted(6, "sphere", "red"),), None)


def test_every_skill_has_its_prompts_and_a_third_are_unseen(drawn):
    asks, batch = drawn
    assert len(asks) == len(batch.valid) == 63
    for skill in asking.SKILLS:
        chosen = [one for one in asks if one.skill == skill]
        assert [one.unseen for one in chosen] == [False] * 6 + [True] * 3


def test_scenes_are_true_pictures_of_their_prompts(drawn):
    asks, batch = drawn
    for one, scene in zip(asks, scenes.as_numpy(batch), strict=True):
        groups = grammar.groups(scene)
        assert grammar.word(scene) == one.word
        assert sum(wanted.count for wanted in one.wanted) == int(scene.valid.sum())
        for wanted in one.wanted:
            named = {name: value for name, value in wanted._asdict().items() if value is not None and name != "count"}
            [group] = [g for g in groups if all(getattr(g, name) == value for name, value in named.items())]
            assert len(group.slots) == wanted.count
        assert bool(tasks.novelties(scene)) == one.unseen


def test_seeds_repeat_and_differ(drawn):
    again, other = asking.prompts(63, 3)[0], asking.prompts(63, 4)[0]
    assert asking.sha256(again) == asking.sha256(drawn[0]) != asking.sha256(other)
    assert np.mean([a.caption == b.caption for a, b in zip(again, other, strict=True)]) < 0.5


def test_too_few_prompts_are_refused():
    with pytest.raises(ValueError, match="20 prompts: use 21 or more"):
        asking.prompts(20, 0)
