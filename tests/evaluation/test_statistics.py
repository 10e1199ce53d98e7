"""Intervals, distances and decibels against known values."""

from __future__ import annotations

import numpy as np
import pytest

from if_jax.evaluation import statistics


def test_wilson_interval_is_that_of_the_books():
    assert statistics.wilson(8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)  # as in Newcombe 1998's method 3
    assert statistics.wilson(0, 20)[0] == 0.0 and statistics.wilson(20, 20)[1] == 1.0
    assert statistics.wilson(0, 0) is None
    assert statistics.share_of([True, False], "x") == {"x": 0.5, "x_ci": statistics.wilson(1, 2)}


def test_kernel_distance_is_nought_of_equals_and_grows():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 400, 8))
    assert abs(statistics.kernel_distance(a, b)) < 0.1
    assert statistics.kernel_distance(a + 1.0, b) > statistics.kernel_distance(a + 0.5, b) > 0.1


def test_psnr_of_a_known_error():
    truth = np.zeros((2, 2, 3))
    assert statistics.psnr(truth + 0.2, truth) == pytest.approx(20.0)
