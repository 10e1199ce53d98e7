"""SynthEval's prompts: every skill has its share, and their scenes are true pictures of them."""

from __future__ import annotations

import numpy as np
import pytest

from if_jax.evaluation.synth import eval_prompts
from if_jax.scenes import grammar, tasks
from if_jax.scenes.scene import as_numpy


@pytest.fixture(scope="module")
def sampled():
    return eval_prompts.sample_prompts(63, 3)


def test_every_skill_has_its_prompts_and_a_third_are_unseen(sampled):
    prompts, batch = sampled
    assert len(prompts) == len(batch.valid) == 63
    for skill in eval_prompts.SKILLS:
        chosen = [prompt for prompt in prompts if prompt.skill == skill]
        assert [prompt.unseen for prompt in chosen] == [False] * 6 + [True] * 3


def test_scenes_are_true_pictures_of_their_prompts(sampled):
    prompts, batch = sampled
    for prompt, scene in zip(prompts, as_numpy(batch), strict=True):
        groups = grammar.groups(scene)
        assert grammar.word(scene) == prompt.word
        assert sum(named.number for named in prompt.groups) == int(scene.valid.sum())
        for named in prompt.groups:
            fields = {name: value for name, value in named._asdict().items() if value is not None and name != "number"}
            [group] = [g for g in groups if all(getattr(g, name) == value for name, value in fields.items())]
            assert len(group.slots) == named.number
        assert bool(tasks.novelties(scene)) == prompt.unseen


def test_prompts_that_name_every_colour_are_coloured():
    assert eval_prompts.make_prompt("two red cubes and a large cyan sphere").coloured
    assert not eval_prompts.make_prompt("two red cubes and a large sphere").coloured


def test_seeds_repeat_and_differ(sampled):
    again, other = eval_prompts.sample_prompts(63, 3)[0], eval_prompts.sample_prompts(63, 4)[0]
    assert eval_prompts.sha256(again) == eval_prompts.sha256(sampled[0]) != eval_prompts.sha256(other)
    assert np.mean([a.caption == b.caption for a, b in zip(again, other, strict=True)]) < 0.5


def test_too_few_prompts_are_refused():
    with pytest.raises(ValueError, match="20 prompts: use 21 or more"):
        eval_prompts.sample_prompts(20, 0)
