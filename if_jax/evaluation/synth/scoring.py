"""The rules: when a picture is right, and what the sums of right pictures are worth.

The scenes' captions name everything there is, and their world has three shapes only, so a picture is right where the
objects in it are those asked for and no others. GenEval, whose world has eighty, asks for at least those (exactly,
where it counts); that is kept beside it as the loose score, and neither is comparable with published numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from if_jax.evaluation.synth.eval_prompts import OBJECT_SKILLS, EvalPrompt, Wanted
from if_jax.evaluation.synth.reading import Seen

MARGIN = 0.15  # floor units by which a relation must hold; captions name those that hold by 0.3
_Z = 1.959964  # of a 95 % interval


def right(one: EvalPrompt, seen: Sequence[Seen], loose: bool = False) -> bool:
    """Whether the objects seen are those asked for. loose: others may stand beside them, as in GenEval."""
    groups = [[other for other in seen if _fits(wanted, other)] for wanted in one.wanted]
    counts = [(len(group), wanted.count) for group, wanted in zip(groups, one.wanted, strict=True)]
    if loose:
        exactly = one.skill == "count"
        fits = all(found == count if exactly else found >= count for found, count in counts)
    else:
        fits = all(found == count for found, count in counts) and len(seen) == sum(count for _, count in counts)
    return fits and (one.relation is None or holds(one.relation, groups[0], groups[1]))


def holds(relation: str, a: Sequence[Seen], b: Sequence[Seen]) -> bool:
    """Whether all of `a` stand to all of `b` as the relation says."""
    if relation in ("right of", "behind"):
        a, b, relation = b, a, {"right of": "left of", "behind": "in front of"}[relation]
    axis = "right" if relation == "left of" else "away"
    return min(getattr(one, axis) for one in b) - max(getattr(one, axis) for one in a) > MARGIN


def wilson(hits: int, total: int) -> list[float] | None:
    """Wilson's 95 % interval of a share (Wilson 1927); None of nothing."""
    if not total:
        return None
    share, z2 = hits / total, _Z * _Z
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total)) / (1 + z2 / total)
    return [round(max(0.0, middle - half), 4), round(min(1.0, middle + half), 4)]


def skill_scores(asks: Sequence[EvalPrompt], hits: Sequence[bool]) -> dict[str, Any]:
    """The share of right pictures of each of the six tasks and `overall`, their mean, each with `<name>_ci`.

    The interval of `overall` is that of the pooled share, which is the mean where the tasks have equally many prompts.
    """
    by_skill = {name: [hit for one, hit in zip(asks, hits, strict=True) if one.skill == name] for name in OBJECT_SKILLS}
    shares = [sum(found) / len(found) for found in by_skill.values() if found]
    pooled = [hit for found in by_skill.values() for hit in found]
    scores = share_of(pooled, "overall") | {"overall": round(sum(shares) / len(shares), 4) if shares else None}
    for name, found in by_skill.items():
        scores |= share_of(found, name)
    return scores


def share_of(hits: Iterable[bool], name: str) -> dict[str, Any]:
    """{name: share, name_ci: interval}; None of nothing."""
    hits = list(hits)
    return {name: round(sum(hits) / len(hits), 4) if hits else None, f"{name}_ci": wilson(sum(hits), len(hits))}


def unseen_gap(asks: Sequence[EvalPrompt], hits: Sequence[bool]) -> float | None:
    """By how much known combinations are drawn better than unseen ones, over the tasks of which both name colours."""
    gaps = []
    for name in ("count", "colour", "position", "binding"):
        named = [(one.unseen, hit) for one, hit in zip(asks, hits, strict=True) if one.skill == name and one.coloured]
        known, unseen = ([hit for new, hit in named if new == which] for which in (False, True))
        if known and unseen:
            gaps.append(sum(known) / len(known) - sum(unseen) / len(unseen))
    return round(sum(gaps) / len(gaps), 4) if gaps else None


def kernel_distance(a: np.ndarray, b: np.ndarray, scale: np.ndarray | None = None) -> float:
    """Unbiased squared MMD of features (N, D), (M, D) with the kernel (xᵀy/D + 1)³ (KID, arXiv 1801.01401).

    scale: features (K, D) by whose mean and deviation both are standardised; `b` unless given. About 0 for two samples
    of one distribution, sometimes below.
    """
    reference = b if scale is None else scale
    mean, deviation = reference.mean(0), reference.std(0) + 1e-6
    a, b = ((np.asarray(x, np.float64) - mean) / deviation for x in (a, b))

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: np.ndarray) -> float:
        k = kernel(x, x)
        return float((k.sum() - np.trace(k)) / (len(x) * (len(x) - 1)))

    return within(a) + within(b) - 2 * float(kernel(a, b).mean())


def psnr(picture: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal to noise ratio in dB of pictures in [-1, 1]."""
    error = float(np.mean(np.square(np.clip(picture, -1, 1) - truth)))
    return 10 * math.log10(4 / max(error, 1e-12))


def word_scores(words: Sequence[str], told: Sequence[str]) -> dict[str, Any]:
    """Signs show capitals: `exact` and `caseless` shares with intervals, and `cer`, caseless edits per letter."""
    pairs = [(word.upper(), text) for word, text in zip(words, told, strict=True)]
    edits = sum(_edits(word, text.upper()) for word, text in pairs)
    exact = share_of((word == text for word, text in pairs), "exact")
    caseless = share_of((word == text.upper() for word, text in pairs), "caseless")
    return exact | caseless | {"cer": round(edits / max(1, sum(len(word) for word, _ in pairs)), 4)}


def flat(scores: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Some of the scores, without their intervals."""
    return {name: scores[name] for name in names}


def _fits(wanted: Wanted, seen: Seen) -> bool:
    return all(
        asked is None or asked == getattr(seen, name)
        for name, asked in zip(Wanted._fields[1:], wanted[1:], strict=True)
    )


def _edits(a: str, b: str) -> int:
    """Levenshtein's distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]
