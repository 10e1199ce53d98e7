"""Averages of a length that was not kept, made of snapshots: against the same average kept all along."""

from __future__ import annotations

import numpy as np
import pytest

from if_jax.diffusion.power_average import LONGEST, Profile, exponent, factors

KEPT = (0.05, 0.1)


def _averages(walk, lengths):
    """The running averages of a walk (T, N) at every update, by length: (T, N) each."""
    made = {}
    for length in lengths:
        rows, average = [], np.zeros_like(walk[0])
        for t, value in enumerate(walk, 1):
            beta = (1 - 1 / t) ** (exponent(length) + 1)
            average = beta * average + (1 - beta) * value
            rows.append(average)
        made[length] = np.array(rows)
    return made


def test_the_exponents_are_the_published_ones():
    """Karras et al. 2024: γ = 16.97 and 6.94 for lengths of 5 and 10 %."""
    assert exponent(0.05) == pytest.approx(16.97, abs=0.005) and exponent(0.1) == pytest.approx(6.94, abs=0.005)
    for length in (0.01, 0.05, 0.2, LONGEST):
        gamma = exponent(length)
        assert np.sqrt(gamma + 1) / ((gamma + 2) * np.sqrt(gamma + 3)) == pytest.approx(length, rel=1e-6)


def test_the_running_average_is_the_mean_by_the_power_function():
    walk, t = np.random.default_rng(0).normal(size=(50, 3)), np.arange(51)
    power = exponent(0.1) + 1
    weights = (t[1:] ** power - t[:-1] ** power) / 50**power
    assert weights.sum() == pytest.approx(1)
    np.testing.assert_allclose(_averages(walk, [0.1])[0.1][-1], weights @ walk, rtol=1e-10)


@pytest.mark.parametrize("length", [0.03, 0.05, 0.08, 0.14, 0.2])
def test_another_length_is_made_of_snapshots(length):
    """Of weights that wander as those of a net do, at ten snapshots."""
    walk = np.random.default_rng(1).normal(size=(2000, 40)).cumsum(0)
    averages = _averages(walk, (*KEPT, length))
    at = range(200, 2001, 200)
    kept = [Profile(own, updates) for updates in at for own in KEPT]
    weights, error = factors(kept, Profile(length, 2000))
    made = sum(weight * averages[own][updates - 1] for weight, (own, updates) in zip(weights, kept, strict=True))
    want, spread = averages[length][-1], walk[-1] - averages[0.1][-1]
    assert weights.sum() == pytest.approx(1)
    off = 0.03 if length in (0.03, 0.2) else 0.005  # of those beyond what was kept
    assert error < 0.08 and np.linalg.norm(made - want) < off * np.linalg.norm(spread)
    if length in KEPT:
        np.testing.assert_allclose(made, want, rtol=1e-6, atol=1e-6)


def test_snapshots_that_are_too_few_say_how_far_off_they_are():
    alone = [Profile(own, 1000) for own in KEPT]
    assert factors(alone, Profile(0.05, 1000))[1] < 1e-6 < 0.01 < factors(alone, Profile(0.02, 1000))[1]


@pytest.mark.parametrize("length", [0.0, -0.1, 0.3, float("nan")])
def test_lengths_that_cannot_be_are_refused(length):
    with pytest.raises(ValueError, match=r"EMA length is .*above 0 and at most 0\.28"):
        exponent(length)
