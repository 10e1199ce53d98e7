"""The primitive layers against plain NumPy in float64."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from if_jax.models.layers import GroupNorm, attention, convolve, downsample, gelu, sinusoid, upsample


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def reference_group_norm(x: np.ndarray, groups: int, eps: float = 1e-5) -> np.ndarray:
    grouped = x.astype(np.float64).reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    mean, variance = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    return ((grouped - mean) / np.sqrt(variance + eps)).reshape(x.shape)


@pytest.mark.parametrize("shape", [(2, 5, 4, 24), (2, 7, 24)])  # an image, a text
def test_group_norm_with_film(shape: tuple[int, ...]) -> None:
    x = normal(*shape) * np.linspace(0.1, 3, 24) + np.linspace(-2, 2, 24)
    gain, bias, scale, shift = (normal(*s, seed=i) for i, s in enumerate([(24,), (24,), (2, 24), (2, 24)], 1))
    out = GroupNorm(num_groups=6).apply({"params": {"scale": gain, "bias": bias}}, x.astype(np.float32), (scale, shift))
    lift = lambda a: a.reshape(2, *(1,) * (x.ndim - 2), 24)  # noqa: E731
    expected = (reference_group_norm(x, 6) * gain + bias) * (1 + lift(scale)) + lift(shift)
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize(("offset", "tolerance"), [(0, 2e-6), (10, 1e-4), (100, 1e-2)])
def test_one_pass_variance_loses_only_what_the_mean_takes(offset: float, tolerance: float) -> None:
    """E[x^2] - E[x]^2 in float32: the error grows with (mean / std)^2, and at 10 is far below a step of bfloat16."""
    x = normal(2, 16, 16, 32) + np.float32(offset)
    out = GroupNorm(num_groups=8).apply({"params": {"scale": np.ones(32), "bias": np.zeros(32)}}, x)
    assert np.abs(np.asarray(out) - reference_group_norm(x, 8)).max() < tolerance


def test_group_norm_survives_a_constant_image() -> None:
    """The variance may round to below zero: no NaN, neither in the value nor in the gradient."""
    norm, params = GroupNorm(num_groups=2), {"params": {"scale": np.ones(4), "bias": np.zeros(4)}}
    x = jnp.full((1, 9, 7, 4), 1234.567)
    assert np.abs(norm.apply(params, x)).max() < 0.1
    assert np.isfinite(jax.grad(lambda x: jnp.sum(norm.apply(params, x) ** 3))(x)).all()


def test_gelu_is_the_exact_one() -> None:
    x = np.linspace(-8, 8, 1001)
    expected = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x])
    assert np.abs(gelu(x.astype(np.float32)) - expected).max() < 1e-6
    assert gelu(jnp.ones(3, jnp.bfloat16)).dtype == jnp.bfloat16


def test_attention_of_contiguous_heads() -> None:
    query, key, value, bias = (
        normal(2, 5, 12),
        normal(2, 7, 12, seed=1),
        normal(2, 7, 12, seed=2),
        normal(3, 5, 7, seed=3),
    )
    out = attention(query, key, value, 3, scale=0.7, bias=bias[None])
    for head in range(3):
        channels = slice(4 * head, 4 * head + 4)
        logits = 0.7 * np.einsum("btd,bsd->bts", query[..., channels], key[..., channels]) + bias[head]
        weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        np.testing.assert_allclose(out[..., channels], weights @ value[..., channels], atol=1e-6)


def test_resampling() -> None:
    x = normal(2, 4, 6, 3)
    np.testing.assert_array_equal(upsample(x), x.repeat(2, axis=1).repeat(2, axis=2))
    np.testing.assert_allclose(downsample(x), x.reshape(2, 2, 2, 3, 2, 3).mean((2, 4)), atol=1e-6)
    np.testing.assert_array_equal(downsample(upsample(x)), x)


@pytest.mark.parametrize("size", [1, 3])
def test_convolution_pads_with_zeros_and_does_not_flip(size: int) -> None:
    x, kernel = normal(1, 4, 5, 2), normal(size, size, 2, 3, seed=1)
    padded = np.pad(x, ((0, 0), *((size // 2,) * 2,) * 2, (0, 0)))
    expected = sum(padded[:, i : i + 4, j : j + 5] @ kernel[i, j] for i in range(size) for j in range(size))
    np.testing.assert_allclose(convolve(x, kernel), expected, atol=1e-5)


def test_sinusoid_is_cosine_then_sine() -> None:
    """Frequencies fall from 1 by equal factors and would reach 1/10000 one step after the last."""
    t = np.array([0, 1, 999])
    angles = t[:, None] * 10000.0 ** -(np.arange(16) / 16)
    np.testing.assert_allclose(sinusoid(jnp.asarray(t), 32), np.hstack([np.cos(angles), np.sin(angles)]), atol=1e-4)
