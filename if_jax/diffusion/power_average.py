"""Averages of the weights whose length is chosen after training (Karras et al. 2024, arXiv:2312.02696, section 3).

Over updates τ in [0, t] the weights are averaged by p(τ) = (γ + 1) τ^γ / t^(γ+1), which runs along as

    θ̂(t) = β θ̂(t − 1) + (1 − β) θ(t),   β = (1 − 1/t)^(γ+1).

The length of such an average is σ = (γ + 1)^½ / ((γ + 2) (γ + 3)^½), the standard deviation of p over t. Snapshots of
two averages of different lengths, taken during training, span nearly every other one: the factors of their sum are
those whose profile is nearest, in least squares, to the profile that is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LONGEST = 0.28  # σ of γ → 0, a plain mean, is 0.2887


class Profile(NamedTuple):
    """One average: its length, and how many updates it has seen."""

    length: float  # σ
    updates: int


def exponent(length: float) -> float:
    """γ of an average of length σ: the positive root of (γ + 2)² (γ + 3) σ² = γ + 1.

    Args:
      length: σ, above 0 and at most `LONGEST`.

    Raises:
      ValueError: it is not.
    """
    if not 0 < length <= LONGEST:
        raise ValueError(f"EMA length is {length}: it must be above 0 and at most {LONGEST}, such as 0.05 or 0.1")
    inverse = length**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots.real.max())


def factors(kept: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """What snapshots are multiplied by to make another average.

    Args:
      kept: of the N snapshots.
      wanted: of the average.

    Returns:
      (N,) float64, of sum 1; and how far the profile of the sum lies from the one that is wanted, as a share of its
      norm.
    """
    products = np.array([[_product(a, b) for b in kept] for a in kept])
    wanted_products = np.array([_product(a, wanted) for a in kept])
    scale = 1 / np.sqrt(np.diag(products))  # of profiles of norm 1: late ones are small, early ones large
    solved, *_ = np.linalg.lstsq(products * scale * scale[:, None], wanted_products * scale, rcond=1e-13)
    made = solved * scale
    made = made / made.sum()
    norm = _product(wanted, wanted)
    left = norm - 2 * made @ wanted_products + made @ products @ made
    return made, float(np.sqrt(max(left, 0.0) / norm))


def _product(a: Profile, b: Profile) -> float:
    """∫ p_a p_b over the updates that both have seen."""
    gamma_a, gamma_b = exponent(a.length), exponent(b.length)
    ratio = a.updates / b.updates
    shared = ratio**gamma_b if ratio < 1 else ratio**-gamma_a
    return (gamma_a + 1) * (gamma_b + 1) * shared / ((gamma_a + gamma_b + 1) * max(a.updates, b.updates))
