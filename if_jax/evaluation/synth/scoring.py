"""The rules: when a picture is right, and what the sums of right pictures are worth.

The scenes' captions name everything there is, and their world has three shapes only, so a picture is right where the
objects in it are those the prompt names and no others. GenEval, whose world has eighty, wants at least those (exactly,
where it counts); that is kept beside it as the loose score, and neither is comparable with published numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from if_jax.evaluation.statistics import share_of
from if_jax.evaluation.synth.eval_prompts import OBJECT_SKILLS, EvalPrompt
from if_jax.evaluation.synth.reading import DetectedObject
from if_jax.scenes.grammar import OPPOSITE, NamedGroup

MARGIN = 0.15  # floor units by which a relation must hold; captions name those that hold by 0.3


def is_right(prompt: EvalPrompt, objects: Sequence[DetectedObject], loose: bool = False) -> bool:
    """Whether the objects of a picture are those that its prompt names.

    Args:
      prompt: what was to be drawn.
      objects: what the reader sees in the picture.
      loose: others may stand beside them, as in GenEval.

    Returns:
      True where numbers, attributes and relation all fit.
    """
    matches = [[item for item in objects if _fits(group, item)] for group in prompt.groups]
    counts = [(len(items), group.number) for items, group in zip(matches, prompt.groups, strict=True)]
    if loose and prompt.skill != "count":
        fits = all(seen >= wanted for seen, wanted in counts)
    else:
        fits = all(seen == wanted for seen, wanted in counts)
        fits &= loose or len(objects) == sum(wanted for _, wanted in counts)
    return fits and (prompt.relation is None or holds(prompt.relation, matches[0], matches[1]))


def holds(relation: str, a: Sequence[DetectedObject], b: Sequence[DetectedObject]) -> bool:
    """Whether all of `a` stand to all of `b`, neither empty, as the relation says."""
    if relation in ("right of", "behind"):
        a, b, relation = b, a, OPPOSITE[relation]
    axis = "right" if relation == "left of" else "away"
    return min(getattr(item, axis) for item in b) - max(getattr(item, axis) for item in a) > MARGIN


def score_objects(prompts: Sequence[EvalPrompt], objects: Sequence[Sequence[DetectedObject]]) -> dict[str, Any]:
    """Score pictures by the objects in them.

    Args:
      prompts: what was to be drawn.
      objects: what the reader sees in each prompt's picture.

    Returns:
      `skill_scores` over known combinations; `unseen`: those over unseen ones, with the `gap` between the two;
      `loose`: those over known ones by the loose rule, without intervals.
    """
    pairs = list(zip(prompts, objects, strict=True))
    hits, loose = ([is_right(*pair, loose=rule) for pair in pairs] for rule in (False, True))
    parts = {}
    for name, by_rule, unseen in (("known", hits, False), ("loose", loose, False), ("unseen", hits, True)):
        chosen = [(prompt, hit) for prompt, hit in zip(prompts, by_rule, strict=True) if prompt.unseen == unseen]
        parts[name] = skill_scores([prompt for prompt, _ in chosen], [hit for _, hit in chosen])
    unseen = parts["unseen"] | {"gap": unseen_gap(prompts, hits)}
    return parts["known"] | {"unseen": unseen, "loose": without_intervals(parts["loose"])}


def skill_scores(prompts: Sequence[EvalPrompt], hits: Sequence[bool]) -> dict[str, Any]:
    """The share of right pictures of each of the six tasks and `overall`, their mean, each with `<name>_ci`.

    The interval of `overall` is that of the pooled share, which is the mean where the tasks have equally many prompts.

    Args:
      prompts: what was to be drawn.
      hits: whether each prompt's picture is right.
    """
    by_skill = {
        name: [hit for prompt, hit in zip(prompts, hits, strict=True) if prompt.skill == name] for name in OBJECT_SKILLS
    }
    shares = [sum(of_skill) / len(of_skill) for of_skill in by_skill.values() if of_skill]
    pooled = [hit for of_skill in by_skill.values() for hit in of_skill]
    scores = share_of(pooled, "overall") | {"overall": round(sum(shares) / len(shares), 4) if shares else None}
    for name, of_skill in by_skill.items():
        scores |= share_of(of_skill, name)
    return scores


def without_intervals(scores: Mapping[str, Any]) -> dict[str, Any]:
    """`overall` and the six tasks of `skill_scores`, without their intervals."""
    return {name: scores[name] for name in ("overall", *OBJECT_SKILLS)}


def unseen_gap(prompts: Sequence[EvalPrompt], hits: Sequence[bool]) -> float | None:
    """By how much known combinations are drawn better than unseen ones.

    Args:
      prompts: only those that name every colour are compared, of the four tasks where both kinds do.
      hits: whether each prompt's picture is right.

    Returns:
      Share of the known minus share of the unseen, the mean over the tasks; None where no task has both.
    """
    gaps = []
    for name in ("count", "colour", "position", "binding"):
        coloured = [(p.unseen, hit) for p, hit in zip(prompts, hits, strict=True) if p.skill == name and p.coloured]
        known, unseen = ([hit for new, hit in coloured if new == which] for which in (False, True))
        if known and unseen:
            gaps.append(sum(known) / len(known) - sum(unseen) / len(unseen))
    return round(sum(gaps) / len(gaps), 4) if gaps else None


def word_scores(words: Sequence[str], readings: Sequence[str]) -> dict[str, Any]:
    """Score the words that a reader of text finds on signs, which show capitals.

    Args:
      words: what each sign should say, in lower case.
      readings: what was read on it.

    Returns:
      `exact` and `caseless` shares with intervals, and `cer`: caseless edits per letter.
    """
    pairs = [(word.upper(), text) for word, text in zip(words, readings, strict=True)]
    edits = sum(_edits(word, text.upper()) for word, text in pairs)
    exact = share_of((word == text for word, text in pairs), "exact")
    caseless = share_of((word == text.upper() for word, text in pairs), "caseless")
    return exact | caseless | {"cer": round(edits / max(1, sum(len(word) for word, _ in pairs)), 4)}


def _fits(group: NamedGroup, item: DetectedObject) -> bool:
    wanted = {name: getattr(group, name) for name in ("shape", "colour", "size", "material")}
    return all(value is None or value == getattr(item, name) for name, value in wanted.items())


def _edits(a: str, b: str) -> int:
    """Levenshtein's distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]
