"""Guidance and dynamic thresholding: their defining properties and parity with diffusers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from if_jax.diffusion import process
from if_jax.diffusion.guidance import classifier_free, dynamic_threshold, guided, projected
from if_jax.diffusion.schedule import cosine_schedule

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SHAPE = (2, 4, 4, 3)


def normal(seed: int, shape: tuple[int, ...] = SHAPE, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


@jax.jit
def net(x_t, t, text):
    """Any function that mixes all its inputs."""
    bias = jnp.sin(text.sum(axis=1))[:, None, None, None] + 0.001 * t[:, None, None, None]
    return jnp.concatenate([x_t * jnp.cos(bias) + bias, jnp.tanh(x_t - bias)], axis=-1)


def free(cond, uncond, weight):
    """Classifier-free guidance of `net`."""
    return guided(net, (cond, uncond), classifier_free(weight))


X_T, T = normal(0), np.array([3, 700], np.int32)
COND, UNCOND = normal(1, (2, 7)), normal(2, (2, 7))


def test_weight_1_is_conditional_and_0_unconditional():
    conditional, unconditional = net(X_T, T, COND), net(X_T, T, UNCOND)
    np.testing.assert_allclose(free(COND, UNCOND, 1.0)(X_T, T), conditional, atol=1e-6)
    np.testing.assert_allclose(free(COND, UNCOND, 0.0)(X_T, T)[..., :3], unconditional[..., :3], atol=1e-6)


def test_guidance_extrapolates_the_noise_and_leaves_the_variance():
    conditional, unconditional = net(X_T, T, COND), net(X_T, T, UNCOND)
    out = free(COND, UNCOND, 7.0)(X_T, T)
    np.testing.assert_allclose(out[..., :3], 7 * conditional[..., :3] - 6 * unconditional[..., :3], atol=1e-5)
    np.testing.assert_array_equal(out[..., 3:], conditional[..., 3:])


def test_the_net_runs_once_with_the_branches_of_a_picture_side_by_side():
    calls = []

    def spy(x_t, t, text):
        calls.append((x_t, t, text))
        return net(x_t, t, text)

    guided(spy, (COND, UNCOND), classifier_free(7.0))(X_T, T)
    ((x_t, t, text),) = calls
    np.testing.assert_array_equal(x_t, X_T[[0, 0, 1, 1]])
    np.testing.assert_array_equal(t, T[[0, 0, 1, 1]])
    np.testing.assert_array_equal(text, np.stack([COND[0], UNCOND[0], COND[1], UNCOND[1]]))


def test_weight_may_be_traced_and_may_differ_between_images():
    traced = jax.jit(lambda w: free(COND, UNCOND, w)(X_T, T))
    np.testing.assert_allclose(traced(4.0), free(COND, UNCOND, 4.0)(X_T, T), atol=1e-5)
    mixed = traced(jnp.array([1.0, 4.0]))
    np.testing.assert_allclose(mixed[0], traced(1.0)[0], atol=1e-6)
    np.testing.assert_allclose(mixed[1], traced(4.0)[1], atol=1e-6)


def test_conditioning_may_be_a_tree_with_one_row_for_all():
    def tree_net(x_t, t, cond):
        return net(x_t + cond["low"], t, cond["text"])

    low = normal(3)
    empty = UNCOND[:1]
    branches = ({"text": COND, "low": low}, {"text": empty, "low": low})
    out = guided(tree_net, branches, classifier_free(3.0))(X_T, T)
    want = free(COND, np.repeat(empty, 2, axis=0), 3.0)(X_T + low, T)
    np.testing.assert_allclose(out, want, atol=1e-6)


@pytest.mark.parametrize("max_value", [1.0, 1.5, 100.0])
@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
def test_threshold_matches_diffusers(max_value, scale):
    x0 = normal(4, (3, 8, 8, 3), scale)
    scheduler = diffusers.DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=0.95, sample_max_value=max_value)
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
        branches = jnp.tile(value_c, 2), jnp.tile(value_u, 2)
        return guided(lambda x, t, text: text, branches, classifier_free(5.0))(X_T, T)[..., :3]

    x0 = process.x0_from_prediction(schedule, "v", X_T, T, fixed(velocity(eps_c), velocity(eps_u)))
    by_velocity = process.eps_from_x0(schedule, X_T, T, x0)
    np.testing.assert_allclose(by_velocity, fixed(eps_c, eps_u), atol=1e-4)


def test_the_positive_branch_is_mixed_into_the_conditional():
    style = normal(11, (2, 7))
    cond, positive, uncond = (net(X_T, T, text)[..., :3] for text in (COND, style, UNCOND))
    out = guided(net, (COND, style, UNCOND), classifier_free(7.0, 0.25))(X_T, T)
    np.testing.assert_allclose(out[..., :3], uncond + 7 * (0.75 * cond + 0.25 * positive - uncond), atol=1e-5)
    np.testing.assert_array_equal(out[..., 3:], net(X_T, T, COND)[..., 3:])
    np.testing.assert_allclose(
        guided(net, (COND, style, UNCOND), classifier_free(7.0, 0.0))(X_T, T),
        free(COND, UNCOND, 7.0)(X_T, T),
        atol=1e-5,
    )


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_projected_guidance_pushes_across_the_prediction(prediction):
    """With η = 1 it is classifier-free guidance; with η = 0 nothing is added along x_c; ‖Δ‖ is at most r."""
    schedule, t = cosine_schedule(), np.array([100, 500])
    cond, uncond = normal(12), normal(13)

    def x0_of(combine):
        predicted = [process.prediction_from_x0(schedule, prediction, X_T, t, x) for x in (cond, uncond)]
        return process.x0_from_prediction(schedule, prediction, X_T, t, combine(predicted, X_T, t))

    free_x0 = uncond + 5 * (cond - uncond)
    np.testing.assert_allclose(x0_of(projected(5.0, schedule, prediction, 1.0)), free_x0, atol=1e-3)
    push = np.asarray(x0_of(projected(5.0, schedule, prediction, 0.0)) - cond)
    along = (push * cond).sum((1, 2, 3)) / (cond * cond).sum((1, 2, 3))
    np.testing.assert_allclose(along, 0, atol=1e-4)
    assert np.abs(push).max() > 1
    bounded = np.asarray(x0_of(projected(5.0, schedule, prediction, 1.0, norm=0.1)) - cond)
    np.testing.assert_allclose(np.sqrt((bounded**2).mean((1, 2, 3))), 4 * 0.1, rtol=1e-3)
