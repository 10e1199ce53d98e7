"""What SynthEval asks for: captions of scenes by task, and what each promises, word by word.

The six tasks are those of GenEval (Ghosh et al. 2023, arXiv 2310.11513) in the world of the scenes: an object, two
objects, counting, colour, position, attributes bound to their objects; the seventh is a word on a sign. A third of the
prompts are of the held-out split, whose combinations no picture of the source "tasks" shows.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import NamedTuple

import jax
import numpy as np

from if_jax.scenes import tasks
from if_jax.scenes.scene import COLOURS, MATERIALS, NUMBERS, RELATIONS, SHAPES, SIZES, Scene, as_numpy

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
_ANY = "|".join
_PHRASE = re.compile(
    rf"\b(?P<number>an?|{_ANY(NUMBERS[1:])}) (?:(?P<size>{_ANY(SIZES)}) )?(?:(?P<colour>{_ANY(COLOURS)}) )?"
    rf"(?:(?P<material>{_ANY(MATERIALS)}) )?(?P<shape>{_ANY(SHAPES)})s?\b"
)
_SIGN = re.compile(r"\bsign (?:that says|saying|with the word) (\w+)")


class Wanted(NamedTuple):
    """So many objects of a kind; an attribute that is not named may be any."""

    count: int
    shape: str
    colour: str | None = None
    size: str | None = None
    material: str | None = None


class EvalPrompt(NamedTuple):
    """One prompt and what a right picture of it shows, nothing else."""

    skill: str
    unseen: bool
    caption: str
    wanted: tuple[Wanted, ...]
    relation: str | None = None  # of the first group to the second
    word: str = ""

    @property
    def coloured(self) -> bool:
        """Whether every object is named with its colour."""
        return all(group.colour for group in self.wanted)


def ask(caption: str, skill: str = "", unseen: bool = False) -> EvalPrompt:
    """Read what a caption of the scenes' grammar promises."""
    wanted = []
    for found in _PHRASE.finditer(caption):
        number = found["number"]
        count = 1 if number in ("a", "an") else NUMBERS.index(number)
        wanted.append(Wanted(count, found["shape"], found["colour"], found["size"], found["material"]))
    sign = _SIGN.search(caption)
    relation = next((name for name in RELATIONS if f" {name} " in caption), None)
    return EvalPrompt(skill, unseen, caption, tuple(wanted), relation, sign[1] if sign else "")


def prompts(count: int, seed: int) -> tuple[list[EvalPrompt], Scene]:
    """`count` prompts of a seed, skill by skill, and scenes (batched) that are true pictures of them.

    The six tasks get equally many, words what is left; the last third of each is unseen.
    Raises ValueError where there are too few for every skill to have both.
    """
    if count < LEAST:
        raise ValueError(f"{count} prompts: use {LEAST} or more, three for each of the {len(SKILLS)} skills")
    each = count // len(SKILLS)
    shares = {skill: each if skill != "words" else count - each * len(OBJECT_SKILLS) for skill in SKILLS}
    wanted = {
        (skill, unseen): n // 3 if unseen else n - n // 3 for skill, n in shares.items() for unseen in (False, True)
    }
    found: dict[tuple[str, bool], list[tuple[EvalPrompt, Scene]]] = {key: [] for key in wanted}
    for unseen in (False, True):
        start = 0
        while any(len(found[key]) < n for key, n in wanted.items() if key[1] == unseen):
            for one, scene in _candidates(start, seed, unseen):
                key = one.skill, unseen
                if len(found[key]) < wanted[key]:
                    found[key].append((one, scene))
            start += _CHUNK
    pairs = [pair for key in wanted for pair in found[key]]
    return [one for one, _ in pairs], jax.tree.map(lambda *fields: np.stack(fields), *[scene for _, scene in pairs])


def sha256(asks: list[EvalPrompt]) -> str:
    """Identity of a list of prompts."""
    return hashlib.sha256(json.dumps(asks).encode()).hexdigest()


def _candidates(start: int, seed: int, unseen: bool) -> list[tuple[EvalPrompt, Scene]]:
    """The scenes of one chunk whose caption asks for what their task is about."""
    numbers = np.arange(start, start + _CHUNK)
    batch, kinds = tasks.sample_tasks(numbers, _SEED + seed, unseen)
    names = {task: skill for skill, task in SKILLS.items()}
    kept = []
    for number, scene, kind in zip(numbers.tolist(), as_numpy(batch), np.asarray(kinds).tolist(), strict=True):
        skill = names[tasks.TASKS[kind]]
        one = ask(tasks.caption(scene, kind, np.random.default_rng((seed, number, int(unseen)))), skill, unseen)
        total = sum(group.count for group in one.wanted)
        needed = {"two": total == 2, "count": total >= 2, "position": one.relation, "binding": total == 2}
        if needed.get(skill, True) and bool(tasks.novelties(scene)) == unseen:
            kept.append((one, scene))
    return kept
