"""FID, KID, precision and recall against torch-fidelity's own code; CMMD against its closed form for Gaussians."""

from __future__ import annotations

import importlib
import sys
import types

import fidelity
import numpy as np
import pytest

from if_jax.evaluation import measures

RNG = np.random.default_rng(0)
DRAWN = RNG.normal(0.2, 1.1, (180, 24)).astype(np.float32)
TRUE = RNG.normal(0.0, 1.0, (150, 24)).astype(np.float32)


@pytest.fixture(scope="module")
def oracle():
    """torch-fidelity's measures."""
    package = fidelity.package()
    stubs = {"torchvision": (), "torchvision.datasets": ("CIFAR10", "STL10"), "torchvision.transforms": ("Compose",)}
    with pytest.MonkeyPatch.context() as patch:
        for name, content in stubs.items():
            module = types.ModuleType(name)
            for attribute in content:
                setattr(module, attribute, type(attribute, (), {}))
            patch.setitem(sys.modules, name, module)
        patch.setitem(sys.modules, "torch_fidelity", package)
        for part in ("utils", "utils_torch", "utils_torchvision", "registry"):  # readers of pictures: not asked for
            stub = types.ModuleType(f"torch_fidelity.{part}")
            stub.__getattr__ = lambda name: None
            patch.setitem(sys.modules, stub.__name__, stub)
        yield types.SimpleNamespace(
            **{name: importlib.import_module(f"torch_fidelity.metric_{name}") for name in ("fid", "kid", "prc")}
        )


def test_fid_is_that_of_torch_fidelity(oracle):
    torch = pytest.importorskip("torch")
    stats = [oracle.fid.fid_features_to_statistics(torch.tensor(x, dtype=torch.float64)) for x in (DRAWN, TRUE)]
    want = oracle.fid.fid_statistics_to_metric(*stats, False)["frechet_inception_distance"]
    got = measures.frechet_distance(measures.moments(DRAWN), measures.moments(TRUE))
    assert got == pytest.approx(want, rel=1e-6)


def test_kid_is_that_of_torch_fidelity(oracle):
    torch = pytest.importorskip("torch")
    x, y = (torch.tensor(rows, dtype=torch.float64) for rows in (DRAWN, TRUE))
    want = oracle.kid.kid_features_to_metric(x, y, kid_subset_size=64, verbose=False)
    got = measures.kid(DRAWN, TRUE, 64)
    assert got == pytest.approx(tuple(want[f"kernel_inception_distance_{part}"] for part in ("mean", "std")), rel=1e-6)


def test_precision_and_recall_are_those_of_torch_fidelity(oracle):
    torch = pytest.importorskip("torch")
    x, y = (torch.tensor(rows, dtype=torch.float64) for rows in (DRAWN, TRUE))
    assert measures.precision_recall(DRAWN, TRUE) == pytest.approx(
        oracle.prc.calculate_precision_recall_full(x, y, 3, 10_000), abs=1e-7
    )


def test_frechet_distance_of_known_gaussians():
    """Commuting covariances: the sum over axes of (difference of means)² + (difference of deviations)²."""
    mean, a, b = np.array([1.0, -2.0, 0.5]), np.array([1.0, 2.0, 0.0]), np.array([0.5, 2.5, 0.0])
    first = measures.Moments(mean, np.diag(a**2), 10)
    second = measures.Moments(0 * mean, np.diag(b**2), 10)
    want = (mean**2).sum() + ((a - b) ** 2).sum()
    assert measures.frechet_distance(first, second) == pytest.approx(want, rel=1e-12)
    assert measures.frechet_distance(first, first) == pytest.approx(0, abs=1e-12)


def test_moments_do_not_depend_on_the_scale_of_the_mean():
    far = DRAWN.astype(np.float64) + 1e6
    np.testing.assert_allclose(measures.moments(far).covariance, np.cov(far, rowvar=False), rtol=1e-6, atol=1e-9)


def test_cmmd_against_its_definition_and_closed_form():
    x, y = DRAWN[:40].astype(np.float64), TRUE[:50].astype(np.float64)

    def mean(a, b):
        return np.mean([[np.exp(-((p - q) ** 2).sum() / (2 * 10**2)) for q in b] for p in a])

    want = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert measures.cmmd(x, y) == pytest.approx(want, rel=1e-9)
    # Two Gaussians N(m, s² I) in D dimensions: E k = (σ²/(σ² + 2 s²))^(D/2) exp(-|m - m'|² / (2 (σ² + 2 s²))).
    size, shift, sigma = 6, 3.0, 10.0
    rng = np.random.default_rng(1)
    a, b = rng.normal(0, 2.0, (4000, size)), rng.normal(0, 2.0, (4000, size)) + shift / size**0.5
    wide = sigma**2 + 2 * 2.0**2
    closed = 2000 * (sigma**2 / wide) ** (size / 2) * (1 - np.exp(-(shift**2) / (2 * wide)))
    assert measures.cmmd(a, b) == pytest.approx(closed, rel=0.1)


def test_clip_score_is_the_cosine_in_percent():
    texts = DRAWN[:5] * [[1], [2], [-1], [0.5], [1]]
    np.testing.assert_allclose(measures.clip_scores(DRAWN[:5], texts), [100, 100, 0, 100, 100], rtol=1e-6)


def test_an_interval_is_as_wide_as_the_figure_varies():
    """The mean of 400 numbers of deviation 2: 1.96 · 2 / 20 to either side."""
    values = np.random.default_rng(2).normal(5, 2, 400)
    figure = measures.with_interval(float(values.mean()), 400, lambda rows: float(values[rows].mean()))
    low, high = figure.interval
    assert low < figure.value < high and (high - low) / 2 == pytest.approx(1.96 * 2 / 20, rel=0.4)
    assert measures.with_interval(1.0, 4, lambda rows: 1.0).interval is None


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: measures.moments(DRAWN[:1]), "two pictures at least, there are 1"),
        (lambda: measures.kid(DRAWN, TRUE), "subsets of 1000 need as many pictures, there are 180 and 150"),
        (lambda: measures.precision_recall(DRAWN[:3], TRUE), "3 neighbours need more pictures"),
    ],
)
def test_too_few_pictures_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()
