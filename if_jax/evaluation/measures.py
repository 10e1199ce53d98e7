"""What the field compares sets of pictures with, from features: FID, KID, precision and recall, CMMD, CLIP score.

Everything is computed in float64 and in the order of the pictures, so that the same features give the same bits,
whoever computed them. Definitions are those of torch-fidelity and google-research/cmmd, so that figures compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

KID_SUBSETS, KID_SUBSET_SIZE, KID_SEED = 100, 1000, 2020  # torch-fidelity's
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # Jayasumana et al. 2024, arXiv:2401.09603
NEIGHBOURS = 3  # Kynkäänniemi et al. 2019, arXiv:1904.06991
_ROWS = 1024  # of a distance matrix held at a time
_BOOTSTRAPS = 20
_Z = 1.959964


class Moments(NamedTuple):
    """What FID keeps of a set of pictures."""

    mean: np.ndarray  # (D,) float64
    covariance: np.ndarray  # (D, D) float64, of samples: divided by N - 1
    pictures: int


class Measure(NamedTuple):
    """A figure with its 95 % interval; None where the pictures are too few for one."""

    value: float
    interval: tuple[float, float] | None


def moments(features: np.ndarray) -> Moments:
    """Mean and covariance of features (N, D), N at least 2, summed a fixed number of rows at a time.

    Args:
      features: of any float type.

    Raises:
      ValueError: there are fewer than two.
    """
    if len(features) < 2:
        raise ValueError(f"a covariance needs two pictures at least, there are {len(features)}")
    wide = [np.asarray(rows, np.float64) for rows in _blocks(features)]
    mean = sum(rows.sum(0) for rows in wide) / len(features)
    products = sum((rows - mean).T @ (rows - mean) for rows in wide)
    return Moments(np.asarray(mean), np.asarray(products) / (len(features) - 1), len(features))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Fréchet distance of two Gaussians (Heusel et al. 2017, arXiv:1706.08500): FID on Inception's features.

    |μa - μb|² + tr(Σa) + tr(Σb) - 2 tr((Σa Σb)^½). The last trace is taken of the symmetric Σa^½ Σb Σa^½, which has the
    same eigenvalues and none below zero but for rounding.

    Args:
      a: of one set.
      b: of the other, of as many features.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    joint = np.linalg.eigvalsh(root @ b.covariance @ root)
    difference = a.mean - b.mean
    trace = np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(np.maximum(joint, 0)).sum()
    return float(difference @ difference + trace)


def kid(a: np.ndarray, b: np.ndarray, subset_size: int = KID_SUBSET_SIZE) -> tuple[float, float]:
    """Kernel Inception distance (Bińkowski et al. 2018, arXiv:1801.01401): its mean and deviation over subsets.

    Args:
      a: features (N, D).
      b: features (M, D).
      subset_size: pictures of a subset, at most N and M.

    Raises:
      ValueError: a set has fewer pictures.
    """
    if min(len(a), len(b)) < subset_size:
        raise ValueError(f"subsets of {subset_size} need as many pictures, there are {len(a)} and {len(b)}")
    rng, values = np.random.RandomState(KID_SEED), []
    for _ in range(KID_SUBSETS):
        x = np.asarray(a[rng.choice(len(a), subset_size, replace=False)], np.float64)
        y = np.asarray(b[rng.choice(len(b), subset_size, replace=False)], np.float64)
        values.append(cubic_mmd(x, y))
    return float(np.mean(values)), float(np.std(values))


def cubic_mmd(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared MMD with KID's kernel (xᵀy/D + 1)³ of features (N, D) and (M, D), float64."""

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: np.ndarray) -> float:
        values = kernel(x, x)
        return float((values.sum() - np.trace(values)) / (len(x) * (len(x) - 1)))

    return within(a) + within(b) - 2 * float(kernel(a, b).mean())


def precision_recall(drawn: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """Improved precision and recall: the share of each set that lies in the other's manifold of nearest neighbours.

    Args:
      drawn: features (N, D), N above `NEIGHBOURS`.
      true: features (M, D), M likewise.

    Raises:
      ValueError: a set has too few pictures.
    """
    if min(len(drawn), len(true)) <= NEIGHBOURS:
        raise ValueError(f"{NEIGHBOURS} neighbours need more pictures, there are {len(drawn)} and {len(true)}")
    drawn, true = np.asarray(drawn, np.float64), np.asarray(true, np.float64)
    return _share_inside(drawn, true), _share_inside(true, drawn)


def cmmd(a: np.ndarray, b: np.ndarray) -> float:
    """CLIP's maximum mean discrepancy, biased, with a Gaussian kernel of σ = 10, times 1000 (arXiv:2401.09603).

    Args:
      a: features (N, D), of length 1 each.
      b: features (M, D), likewise.
    """
    gamma = 1 / (2 * CMMD_SIGMA**2)

    def mean(x: np.ndarray, y: np.ndarray) -> float:
        total = sum(float(np.exp(-gamma * _squared_distances(rows, y)).sum()) for rows in _blocks(x))
        return total / (len(x) * len(y))

    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return CMMD_SCALE * (mean(a, a) + mean(b, b) - 2 * mean(a, b))


def clip_scores(pictures: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """100 · max(cos, 0) of each picture and its caption (Hessel et al. 2021, arXiv:2104.08718; their 2.5 left out).

    Args:
      pictures: features (N, D), of any length.
      texts: features (N, D), row by row.

    Returns:
      (N,) float64.
    """
    x, y = normalised(pictures), normalised(texts)
    return 100 * np.maximum((x * y).sum(1), 0)


def normalised(features: np.ndarray) -> np.ndarray:
    """Features (N, D) at length 1, float64."""
    wide = np.asarray(features, np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)


def with_interval(value: float, count: int, measure: Callable[[np.ndarray], float], seed: int = 0) -> Measure:
    """A figure and its interval, from the spread of the same figure over resampled pictures (the bootstrap).

    Distances grow when pictures repeat, so the spread is laid around the figure itself, not around the resampled mean.

    Args:
      value: the figure of all pictures.
      count: how many pictures there are.
      measure: rows of pictures (N,) -> the figure of those.
      seed: of the resampling.
    """
    if count < 8:
        return Measure(value, None)
    rng = np.random.default_rng(seed)
    spread = np.std([measure(rng.integers(0, count, count)) for _ in range(_BOOTSTRAPS)], ddof=1)
    return Measure(value, (float(value - _Z * spread), float(value + _Z * spread)))


def _share_inside(points: np.ndarray, manifold: np.ndarray) -> float:
    """The share of points in the ball round some point of a manifold, which reaches to that point's k-th neighbour."""
    distances = (_squared_distances(rows, manifold) for rows in _blocks(manifold))
    radii = np.concatenate([np.partition(rows, NEIGHBOURS, axis=1)[:, NEIGHBOURS] for rows in distances])
    inside = [(_squared_distances(rows, manifold) <= radii).any(1) for rows in _blocks(points)]
    return float(np.concatenate(inside).mean())


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum((x * x).sum(1)[:, None] + (y * y).sum(1) - 2 * x @ y.T, 0)


def _blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), _ROWS):
        yield rows[start : start + _ROWS]
