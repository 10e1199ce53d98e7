"""Guidance and dynamic thresholding: their defining properties and parity with diffusers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from if_jax.diffusion import process
from if_jax.diffusion.guidance import dynamic_threshold, guided
from if_jax.diffusion.schedule import cosine_schedule

SHAPE = (2, 4, 4, 3)


def normal(seed: int, shape: tuple[int, ...] = SHAPE, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


@jax.jit
def net(x_t, t, text):
    """Any function that mixes all its inputs."""
    bias = jnp.sin(text.sum(axis=1))[:, None, None, None] + 0.001 * t[:, None, None, None]
    return jnp.concatenate([x_t * jnp.cos(bias) + bias, jnp.tanh(x_t - bias)], axis=-1)


X_T, T = normal(0), np.array([3, 700], np.int32)
COND, UNCOND = normal(1, (2, 7)), normal(2, (2, 7))


def test_weight_1_is_conditional_and_0_unconditional():
    conditional, unconditional = net(X_T, T, COND), net(X_T, T, UNCOND)
    np.testing.assert_allclose(guided(net, COND, UNCOND, 1.0)(X_T, T), conditional, atol=1e-6)
    np.testing.assert_allclose(guided(net, COND, UNCOND, 0.0)(X_T, T)[..., :3], unconditional[..., :3], atol=1e-6)


def test_guidance_extrapolates_the_noise_and_leaves_the_variance():
    conditional, unconditional = net(X_T, T, COND), net(X_T, T, UNCOND)
    out = guided(net, COND, UNCOND, 7.0)(X_T, T)
    np.testing.assert_allclose(out[..., :3], 7 * conditional[..., :3] - 6 * unconditional[..., :3], atol=1e-5)
    np.testing.assert_array_equal(out[..., 3:], conditional[..., 3:])


def test_the_net_runs_once_on_conditional_then_unconditional():
    calls = []

    def spy(x_t, t, text):
        calls.append((x_t, t, text))
        return net(x_t, t, text)

    guided(spy, COND, UNCOND, 7.0)(X_T, T)
    ((x_t, t, text),) = calls
    np.testing.assert_array_equal(x_t, np.concatenate([X_T, X_T]))
    np.testing.assert_array_equal(t, np.concatenate([T, T]))
    np.testing.assert_array_equal(text, np.concatenate([COND, UNCOND]))


def test_weight_may_be_traced_and_may_differ_between_images():
    traced = jax.jit(lambda w: guided(net, COND, UNCOND, w)(X_T, T))
    np.testing.assert_allclose(traced(4.0), guided(net, COND, UNCOND, 4.0)(X_T, T), atol=1e-5)
    mixed = traced(jnp.array([1.0, 4.0]))
    np.testing.assert_allclose(mixed[0], traced(1.0)[0], atol=1e-6)
    np.testing.assert_allclose(mixed[1], traced(4.0)[1], atol=1e-6)


def test_conditioning_may_be_a_tree_with_one_row_for_all():
    def tree_net(x_t, t, given):
        return net(x_t + given["low"], t, given["text"])

    low = normal(3)
    one = UNCOND[:1]
    out = guided(tree_net, {"text": COND, "low": low}, {"text": one, "low": low}, 3.0)(X_T, T)
    want = guided(net, COND, np.repeat(one, 2, axis=0), 3.0)(X_T + low, T)
    np.testing.assert_allclose(out, want, atol=1e-6)


@pytest.mark.parametrize("max_value", [1.0, 1.5, 100.0])
@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
def test_threshold_matches_diffusers(max_value, scale):
    x0 = normal(4, (3, 8, 8, 3), scale)
    scheduler = DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=0.95, sample_max_value=max_value)
    want = scheduler._threshold_sample(torch.from_numpy(x0.transpose(0, 3, 1, 2).copy())).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(dynamic_threshold(x0, 0.95, max_value), want, atol=1e-6)


def test_threshold_leaves_pictures_in_range_alone():
    x0 = np.clip(normal(5), -1, 1)
    np.testing.assert_array_equal(dynamic_threshold(x0), x0)


def test_threshold_bounds_and_judges_each_image_by_itself():
    x0 = np.concatenate([normal(6, (1, 4, 4, 3), 0.2), normal(7, (1, 4, 4, 3), 9.0)])
    out = dynamic_threshold(x0)
    assert np.abs(out).max() <= 1
    np.testing.assert_array_equal(out[0], x0[0])
    np.testing.assert_array_equal(out[1:], dynamic_threshold(x0[1:]))
    # the loud image needs s > 1.5, and the ceiling holds it there
    np.testing.assert_allclose(out[1], np.clip(x0[1] / 1.5, -1, 1), atol=1e-6)


def test_max_value_1_is_clipping_also_when_traced():
    x0 = normal(8, scale=3.0)
    clipped = np.clip(x0, -1, 1)
    np.testing.assert_array_equal(dynamic_threshold(x0, max_value=1.0), clipped)
    np.testing.assert_array_equal(jax.jit(lambda c: dynamic_threshold(x0, max_value=c))(1.0), clipped)


def test_max_value_below_1_is_refused():
    with pytest.raises(ValueError, match=r"sample_max_value is 0\.5"):
        dynamic_threshold(X_T, max_value=0.5)


def test_guiding_the_velocity_is_guiding_the_noise():
    schedule = cosine_schedule()
    eps_c, eps_u = normal(9), normal(10)

    def velocity(eps):
        return process.v_from_x0_eps(schedule, process.x0_from_eps(schedule, X_T, T, eps), T, eps)

    def fixed(value_c, value_u):
        return guided(lambda x, t, text: text, jnp.tile(value_c, 2), jnp.tile(value_u, 2), 5.0)(X_T, T)[..., :3]

    by_velocity = process.eps_from_v(schedule, X_T, T, fixed(velocity(eps_c), velocity(eps_u)))
    np.testing.assert_allclose(by_velocity, fixed(eps_c, eps_u), atol=1e-4)
