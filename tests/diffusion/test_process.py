"""The process: Bayes' rule by brute force, conversions that undo each other, parity with diffusers."""

from __future__ import annotations

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from if_jax.diffusion import process
from if_jax.diffusion.schedule import cosine_schedule, parse_steps, respace

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

FULL = cosine_schedule()
SHAPE = (4, 6, 5, 3)


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("chain", ["every step", "smart27"])
@pytest.mark.parametrize("position", [0.1, 0.5, 0.9])
def test_posterior_is_the_product_of_two_gaussians(chain, position):
    """q(x_{t−1} | x_t, x0) ∝ q(x_t | x_{t−1}) q(x_{t−1} | x0), multiplied and normalised on a grid."""
    schedule = FULL if chain == "every step" else respace(FULL, parse_steps(chain))
    t = int(position * schedule.num_steps)
    a, p = (float(schedule.alpha_bar[i]) for i in (t, t - 1))
    x0, x_t = 0.3, -0.4
    spread = math.sqrt(1 - p)
    u = np.linspace(-12 * spread, 12 * spread, 400_001) + math.sqrt(p) * x0
    log_density = -((u - math.sqrt(p) * x0) ** 2) / (2 * (1 - p)) - (x_t - math.sqrt(a / p) * u) ** 2 / (
        2 * (1 - a / p)
    )
    weight = np.exp(log_density - log_density.max())
    weight /= weight.sum()
    mean = np.sum(weight * u)
    variance = np.sum(weight * (u - mean) ** 2)

    image = np.ones((1, 1, 1, 1), np.float32)
    got_mean, got_log_variance = process.posterior(schedule, x0 * image, x_t * image, np.array([t]))
    assert float(got_mean[0, 0, 0, 0]) == pytest.approx(mean, abs=2e-5)
    assert float(got_log_variance[0, 0, 0, 0]) == pytest.approx(math.log(variance), abs=1e-4)
    assert float(schedule.posterior_variance[t]) == pytest.approx(variance, rel=1e-4)


def test_posterior_at_index_0_is_x0():
    x0, x_t = normal(0), normal(1)
    mean, log_variance = process.posterior(FULL, x0, x_t, np.zeros(4, int))
    np.testing.assert_allclose(mean, x0, atol=1e-6)
    np.testing.assert_array_equal(log_variance, np.full((4, 1, 1, 1), FULL.posterior_log_variance[1]))


def test_conversions_agree_with_one_another():
    """Every way around x0, ε and v returns to the start, at steps where it is well-conditioned."""
    t = np.array([100, 300, 500, 700])
    x0, eps = normal(2), normal(3)
    x_t = process.add_noise(FULL, x0, t, eps)
    v = process.v_from_x0_eps(FULL, x0, t, eps)
    to_x0 = {"x0": lambda x: x, "eps": process.x0_from_eps, "v": process.x0_from_v}
    truth = {"x0": x0, "eps": eps, "v": v}

    def convert(value, source, target):
        as_x0 = value if source == "x0" else to_x0[source](FULL, x_t, t, value)
        as_eps = value if source == "eps" else process.eps_from_x0(FULL, x_t, t, as_x0)
        return {"x0": as_x0, "eps": as_eps, "v": process.v_from_x0_eps(FULL, as_x0, t, as_eps)}[target]

    for source, target in itertools.permutations(truth, 2):
        there = convert(truth[source], source, target)
        np.testing.assert_allclose(there, truth[target], atol=3e-5, err_msg=f"{source} → {target}")
        np.testing.assert_allclose(convert(there, target, source), truth[source], atol=3e-5)


@pytest.mark.parametrize("t", [0, 1, 500, 998, 999])
def test_x0_from_v_survives_the_ends_of_the_chain(t):
    """At the ends one of x0 and ε is barely in x_t, but v always determines x0."""
    index = np.full(4, t)
    x0, eps = normal(4), normal(5)
    x_t = process.add_noise(FULL, x0, index, eps)
    v = process.v_from_x0_eps(FULL, x0, index, eps)
    np.testing.assert_allclose(process.x0_from_v(FULL, x_t, index, v), x0, atol=2e-6)


def test_noising_at_each_image_its_own_step():
    t = np.array([999, 0, 250, 500])
    x0, eps = normal(6), normal(7)
    together = process.add_noise(FULL, x0, t, eps)
    for b in range(4):
        alone = process.add_noise(FULL, x0[b : b + 1], t[b : b + 1], eps[b : b + 1])
        np.testing.assert_array_equal(together[b : b + 1], alone)
    np.testing.assert_allclose(together[2], 0.919722 * x0[2] + 0.392571 * eps[2], atol=1e-5)


def test_noising_and_velocity_match_diffusers():
    reference = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    t = np.array([0, 100, 600, 999])
    x0, eps = normal(8), normal(9)
    args = torch.from_numpy(x0), torch.from_numpy(eps), torch.from_numpy(t)
    # 1e-5: diffusers takes 1 − ᾱ in float32, which costs it up to three digits at t = 0
    np.testing.assert_allclose(process.add_noise(FULL, x0, t, eps), reference.add_noise(*args).numpy(), atol=1e-5)
    np.testing.assert_allclose(
        process.v_from_x0_eps(FULL, x0, t, eps), reference.get_velocity(*args).numpy(), atol=1e-5
    )


def test_learned_variance_spans_its_range():
    t = np.array([1, 50, 500, 999])
    ones = np.ones(SHAPE, np.float32)
    low = process.learned_range_log_variance(FULL, -ones, t)
    high = process.learned_range_log_variance(FULL, ones, t)
    np.testing.assert_allclose(low[:, 0, 0, 0], np.log(FULL.posterior_variance[t]), rtol=1e-4)
    np.testing.assert_allclose(high[:, 0, 0, 0], np.log(FULL.beta[t]), rtol=1e-4)
    np.testing.assert_allclose(process.learned_range_log_variance(FULL, 0 * ones, t), (low + high) / 2, rtol=1e-5)
    beyond = process.learned_range_log_variance(FULL, 3 * ones, t)  # not clamped
    np.testing.assert_allclose(beyond, 2 * high - low, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_targets_lead_back_to_x0(prediction):
    t = np.array([0, 100, 500, 700])
    x0, eps = normal(10), normal(11)
    x_t = process.add_noise(FULL, x0, t, eps)
    target = process.prediction_target(FULL, prediction, x0, t, eps)
    np.testing.assert_allclose(process.x0_from_prediction(FULL, prediction, x_t, t, target), x0, atol=1e-5)


def test_unknown_predictions_are_refused():
    for function in (process.prediction_target, process.x0_from_prediction):
        with pytest.raises(ValueError, match="prediction is 'score': use one of eps, v, x0"):
            function(FULL, "score", normal(0), np.zeros(4, int), normal(1))


def test_model_output_is_split_noise_first():
    out = jnp.arange(2 * 2 * 2 * 6.0).reshape(2, 2, 2, 6)
    eps, v = process.split_model_output(out)
    np.testing.assert_array_equal(eps, out[..., :3])
    np.testing.assert_array_equal(v, out[..., 3:])
