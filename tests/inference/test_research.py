"""A stage from inside: predictions, and gradients through the network and into pictures."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from if_jax.diffusion import process
from if_jax.inference.cascade import Cascade

T = np.array([100, 600])


@pytest.fixture(scope="module")
def cascade():
    return Cascade.of([tiny.on_one_level(stage) for stage in tiny.stages()], tiny.DEFAULTS)


@pytest.fixture(scope="module")
def text(cascade):
    return jnp.asarray(cascade.embed(["a red cube", "", ""]))


def normal(seed, size=8):
    return np.random.default_rng(seed).normal(size=(2, size, size, 3)).astype(np.float32)


def test_prediction_and_picture_belong_together(cascade, text):
    stage, x_t = cascade.stage("I"), normal(0)
    eps, variance = stage.predict(x_t, T, text[:2])
    assert eps.shape == variance.shape == (2, 8, 8, 3)
    np.testing.assert_allclose(
        stage.denoise(x_t, T, text[:2]), process.x0_from_eps(stage.schedule, x_t, T, eps), rtol=1e-4, atol=1e-4
    )
    later = cascade.stage("II")
    low = later.noised_low_res(normal(1), np.array([0, 500]), normal(2, 16))
    assert later.predict(normal(3, 16), T, text[:2], low)[0].shape == (2, 16, 16, 3)
    with pytest.raises(ValueError, match="stage is 'III': this cascade has I, II"):
        cascade.stage("III")


def test_gradients_run_through_a_stage(cascade, text):
    """Of a loss on x̂0, into x_t: as finite differences say."""
    stage, x_t, direction = cascade.stage("I"), jnp.asarray(normal(4)), normal(5)

    @jax.jit
    def loss(x_t):
        return jnp.mean(stage.denoise(x_t, T, text[:2], text[1:], 3.0)[..., 0] ** 2)

    gradient = jax.jit(jax.grad(loss))(x_t)
    change = (loss(x_t + 1e-2 * direction) - loss(x_t - 1e-2 * direction)) / 2e-2
    assert float((gradient * direction).sum()) == pytest.approx(float(change), rel=0.02)


def test_score_distillation_is_the_published_gradient(cascade, text):
    """Poole et al. 2022: w(t)(ε̂ − ε) at the picture, chained into what has made it, here tanh of 2×2 blocks."""
    stage, eps, t, small = cascade.stage("I"), normal(6), np.array([300, 700]), jnp.asarray(normal(7, 4))

    def render(small):
        return jnp.tanh(jnp.repeat(jnp.repeat(small, 2, axis=1), 2, axis=2))

    def gradient(picture, scale):
        return stage.score_distillation(picture, t, eps, text[:2], text[1:], scale)

    picture = render(small)
    x_t = process.add_noise(stage.schedule, picture, t, eps)
    predicted, _ = stage.predict(x_t, t, text[:2])
    weight = (1 - stage.schedule.alpha_bar[t])[:, None, None, None]
    np.testing.assert_allclose(gradient(picture, 1.0), weight * (predicted - eps), rtol=1e-3, atol=1e-4)
    moved = jax.grad(lambda small: (gradient(render(small), 1.0) * render(small)).sum())(small)  # no second order
    blocks = np.asarray(gradient(picture, 1.0) * (1 - picture**2)).reshape(2, 4, 2, 4, 2, 3).sum((2, 4))
    np.testing.assert_allclose(moved, blocks, rtol=1e-3, atol=1e-4)
    assert np.abs(gradient(picture, 50.0) - gradient(picture, 1.0)).max() > 1e-4  # guidance has its say
