"""What evaluations measure with: shares with intervals, distances between sets of features, errors in decibel."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from if_jax.evaluation.measures import cubic_mmd

_Z = 1.959964  # of a 95 % interval


def wilson(hits: int, total: int) -> list[float] | None:
    """Wilson's 95 % interval of a share (Wilson 1927).

    Args:
      hits: how many of `total` count.
      total: how many there are.

    Returns:
      Its two ends to four digits; None of nothing.
    """
    if not total:
        return None
    share, z2 = hits / total, _Z * _Z
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total)) / (1 + z2 / total)
    return [round(max(0.0, middle - half), 4), round(min(1.0, middle + half), 4)]


def share_of(hits: Iterable[bool], name: str) -> dict[str, Any]:
    """The share of hits and its interval, for a report: {name: share, name_ci: interval}; None of nothing."""
    hits = list(hits)
    return {name: round(sum(hits) / len(hits), 4) if hits else None, f"{name}_ci": wilson(sum(hits), len(hits))}


def kernel_distance(a: np.ndarray, b: np.ndarray, scale: np.ndarray | None = None) -> float:
    """Unbiased squared MMD with the kernel (xᵀy/D + 1)³ (KID, arXiv 1801.01401).

    Args:
      a: features (N, D), N at least 2.
      b: features (M, D), M at least 2.
      scale: features (K, D) by whose mean and deviation both are standardised; `b` unless given.

    Returns:
      About 0 for two samples of one distribution, sometimes below; larger the further they lie apart.
    """
    reference = b if scale is None else scale
    mean, deviation = reference.mean(0), reference.std(0) + 1e-6
    a, b = ((np.asarray(x, np.float64) - mean) / deviation for x in (a, b))
    return cubic_mmd(a, b)


def psnr(picture: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal to noise ratio in dB of two arrays of one shape in [-1, 1]; the first is clipped to that."""
    error = float(np.mean(np.square(np.clip(picture, -1, 1) - truth)))
    return 10 * math.log10(4 / max(error, 1e-12))
