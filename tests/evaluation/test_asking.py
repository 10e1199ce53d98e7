"""What captions promise, read back from their words."""

from __future__ import annotations

import numpy as np
import pytest

from if_jax.evaluation.synth import eval_prompts
from if_jax.evaluation.synth.eval_prompts import Wanted
from if_jax.scenes import grammar, tasks
from if_jax.scenes.scene import as_numpy


@pytest.fixture(scope="module")
def drawn():
    return eval_prompts.prompts(63, 3)


def test_captions_are_read_word_by_word():
    one = eval_prompts.ask("a photo of two small cubes to the left of an orange metal cylinder")
    assert one.wanted == (Wanted(2, "cube", size="small"), Wanted(1, "cylinder", "orange", material="metal"))
    assert one.relation == "left of" and one.word == "" and not one.coloured
    one = eval_prompts.ask("a sign that says moon and six red spheres")
    assert (one.word, one.wanted, one.relation) == ("moon", (Wanted(6, "sphere", "red"),), None)


def test_every_skill_has_its_prompts_and_a_third_are_unseen(drawn):
    asks, batch = drawn
    assert len(asks) == len(batch.valid) == 63
    for skill in eval_prompts.SKILLS:
        chosen = [one for one in asks if one.skill == skill]
        assert [one.unseen for one in chosen] == [False] * 6 + [True] * 3


def test_scenes_are_true_pictures_of_their_prompts(drawn):
    asks, batch = drawn
    for one, scene in zip(asks, as_numpy(batch), strict=True):
        groups = grammar.groups(scene)
        assert grammar.word(scene) == one.word
        assert sum(wanted.count for wanted in one.wanted) == int(scene.valid.sum())
        for wanted in one.wanted:
            named = {name: value for name, value in wanted._asdict().items() if value is not None and name != "count"}
            [group] = [g for g in groups if all(getattr(g, name) == value for name, value in named.items())]
            assert len(group.slots) == wanted.count
        assert bool(tasks.novelties(scene)) == one.unseen


def test_seeds_repeat_and_differ(drawn):
    again, other = eval_prompts.prompts(63, 3)[0], eval_prompts.prompts(63, 4)[0]
    assert eval_prompts.sha256(again) == eval_prompts.sha256(drawn[0]) != eval_prompts.sha256(other)
    assert np.mean([a.caption == b.caption for a, b in zip(again, other, strict=True)]) < 0.5


def test_too_few_prompts_are_refused():
    with pytest.raises(ValueError, match="20 prompts: use 21 or more"):
        eval_prompts.prompts(20, 0)
