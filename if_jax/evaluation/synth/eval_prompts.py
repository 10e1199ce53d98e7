"""The prompts of SynthEval: captions of scenes by task, and what a right picture of each shows.

The six tasks are those of GenEval (Ghosh et al. 2023, arXiv 2310.11513) in the world of the scenes: an object, two
objects, counting, colour, position, attributes bound to their objects; the seventh is a word on a sign. A third of the
prompts are of the held-out split, whose combinations no picture of the source "tasks" shows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from if_jax.scenes import tasks
from if_jax.scenes.grammar import NamedGroup, parse_caption
from if_jax.scenes.scene import Scene, as_numpy

# Scores by the names of the report, and the tasks of `scenes.tasks` they are of.
SKILLS = {
    "single": "single",
    "two": "two",
    "count": "counting",
    "colour": "colour",
    "position": "position",
    "binding": "binding",
    "words": "text",
}
OBJECT_SKILLS = tuple(SKILLS)[:6]
LEAST = 21  # prompts: two known and one unseen of each
_SEED = 5_000_011  # added to the user's: no recipe draws these scenes
_CHUNK = 128


class EvalPrompt(NamedTuple):
    """One prompt and what a right picture of it shows, nothing else."""

    skill: str
    unseen: bool  # of the held-out split
    caption: str
    groups: tuple[NamedGroup, ...]
    relation: str | None = None  # of the first group to the second
    word: str = ""

    @property
    def coloured(self) -> bool:
        """Whether every object is named with its colour."""
        return all(group.colour for group in self.groups)


def make_prompt(caption: str, skill: str = "", unseen: bool = False) -> EvalPrompt:
    """A prompt whose truth is what `parse_caption` reads in its caption.

    Args:
      caption: of the scenes' grammar.
      skill: one of `SKILLS`.
      unseen: it is of the held-out split.
    """
    parsed = parse_caption(caption)
    return EvalPrompt(skill, unseen, caption, parsed.groups, parsed.relation, parsed.word)


def sample_prompts(count: int, seed: int) -> tuple[list[EvalPrompt], Scene]:
    """Prompts of a seed, skill by skill, and scenes that are true pictures of them.

    Args:
      count: how many. The six tasks get equally many, words what is left; the last third of each is unseen.
      seed: another seed has other prompts.

    Returns:
      The prompts, and their scenes, every field with a leading `count`.

    Raises:
      ValueError: too few for every skill to have both known and unseen ones.
    """
    if count < LEAST:
        raise ValueError(f"{count} prompts: use {LEAST} or more, three for each of the {len(SKILLS)} skills")
    each = count // len(SKILLS)
    shares = {skill: each if skill != "words" else count - each * len(OBJECT_SKILLS) for skill in SKILLS}
    wanted = {
        (skill, unseen): n // 3 if unseen else n - n // 3 for skill, n in shares.items() for unseen in (False, True)
    }
    kept: dict[tuple[str, bool], list[tuple[EvalPrompt, Scene]]] = {key: [] for key in wanted}
    for unseen in (False, True):
        start = 0
        while any(len(kept[key]) < n for key, n in wanted.items() if key[1] == unseen):
            for prompt, scene in _candidates(start, seed, unseen):
                key = prompt.skill, unseen
                if len(kept[key]) < wanted[key]:
                    kept[key].append((prompt, scene))
            start += _CHUNK
    prompts, scenes = zip(*(pair for pairs in kept.values() for pair in pairs), strict=True)
    return list(prompts), jax.tree.map(lambda *fields: np.stack(fields), *scenes)


def sha256(prompts: Sequence[EvalPrompt]) -> str:
    """Identity of a list of prompts, hexadecimal."""
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()


def _candidates(start: int, seed: int, unseen: bool) -> Iterator[tuple[EvalPrompt, Scene]]:
    """The scenes of one chunk whose caption names what their task is about."""
    numbers = np.arange(start, start + _CHUNK)
    batch, kinds = tasks.sample_tasks(numbers, _SEED + seed, unseen)
    names = {task: skill for skill, task in SKILLS.items()}
    for number, scene, kind in zip(numbers.tolist(), as_numpy(batch), np.asarray(kinds).tolist(), strict=True):
        skill = names[tasks.TASKS[kind]]
        caption = tasks.caption(scene, kind, np.random.default_rng((seed, number, int(unseen))))
        prompt = make_prompt(caption, skill, unseen)
        total = sum(group.number for group in prompt.groups)
        needed = {"two": total == 2, "count": total >= 2, "position": prompt.relation, "binding": total == 2}
        if needed.get(skill, True) and bool(tasks.novelties(scene)) == unseen:
            yield prompt, scene
