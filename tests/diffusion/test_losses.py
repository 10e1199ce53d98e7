"""The hybrid loss: an independent float64 computation, what trains what, and what happens at the edges."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from if_jax.diffusion import losses, process
from if_jax.diffusion.schedule import cosine_betas, cosine_schedule, parse_steps, respace, schedule_from_betas

FULL = cosine_schedule()
hybrid_loss = jax.jit(losses.hybrid_loss, static_argnames="prediction")
T = np.array([0, 1, 20, 500, 999])
SHAPE = (len(T), 4, 5, 3)


def case(seed: int = 0, error: float = 0.1) -> dict[str, np.ndarray]:
    """A batch at the steps T whose network is off by `error`; x0 holds 8-bit levels, both outermost ones included."""
    rng = np.random.default_rng(seed)
    x0 = (rng.integers(0, 256, SHAPE) / 127.5 - 1).astype(np.float32)
    x0[:, 0, 0], x0[:, 0, 1] = -1, 1
    eps = rng.standard_normal(SHAPE).astype(np.float32)
    eps_hat = eps + error * rng.standard_normal(SHAPE)
    v = rng.uniform(-1.2, 1.2, SHAPE)
    out = np.concatenate([eps_hat, v], axis=-1).astype(np.float32)
    return dict(model_output=out, x0=x0, x_t=np.asarray(process.add_noise(FULL, x0, T, eps)), eps=eps)


def bound_by_hand(schedule, model_output, x0, x_t, t) -> float:
    """L_vb of one image, pixel by pixel in Python floats, from ᾱ alone; nothing of the code under test."""
    alphas = 1 - schedule.beta.astype(np.float64)
    alpha_bar = np.cumprod(alphas)
    a, p, beta = alpha_bar[t], (alpha_bar[t - 1] if t else 1.0), 1 - alphas[t]
    c0, ct = math.sqrt(p) * beta / (1 - a), math.sqrt(alphas[t]) * (1 - p) / (1 - a)
    # the posterior variance of index 0 is that of index 1
    s = max(t, 1)
    smallest = (1 - alphas[s]) * (1 - alpha_bar[s - 1]) / (1 - alpha_bar[s])
    total = 0.0
    for out, target, noisy in zip(model_output.reshape(-1, 6), x0.reshape(-1, 3), x_t.reshape(-1, 3), strict=True):
        for eps_hat, v, x, y in zip(*map(np.float64, (out[:3], out[3:], target, noisy)), strict=True):
            guess = (y - math.sqrt(1 - a) * eps_hat) / math.sqrt(a)
            mean, true_mean = c0 * guess + ct * y, c0 * x + ct * y
            variance = beta ** ((v + 1) / 2) * smallest ** ((1 - v) / 2)
            if t > 0:
                ratio = smallest / variance
                total += 0.5 * (ratio - 1 - math.log(ratio) + (true_mean - mean) ** 2 / variance)
            else:

                def cdf(z, mean=mean, variance=variance):
                    z = (z - mean) / math.sqrt(variance)
                    return 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

                upper = 1.0 if x > 0.999 else cdf(x + 1 / 255)
                lower = 0.0 if x < -0.999 else cdf(x - 1 / 255)
                total -= math.log(max(upper - lower, 1e-12))
    return total / x0.size / math.log(2)


@pytest.mark.parametrize("error", [0.0, 0.1, 1.0])
def test_bound_equals_an_independent_float64_computation(error):
    batch = case(error=error)
    got = hybrid_loss(FULL, **batch, t=T)
    for b, t in enumerate(T):
        expected = bound_by_hand(FULL, *(batch[k][b] for k in ("model_output", "x0", "x_t")), t)
        assert float(got["vb"][b]) == pytest.approx(expected, rel=2e-4, abs=2e-6), f"t = {t}"


def test_the_bound_counts_by_its_weight():
    batch = case()
    got, half = (hybrid_loss(FULL, **batch, t=T, bound_weight=weight) for weight in (1.0, 0.5))
    np.testing.assert_allclose(got["loss"] - half["loss"], got["vb"] / 2, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(hybrid_loss(FULL, **batch, t=T, bound_weight=0.0)["loss"], got["mse"])


def test_velocity_bound_equals_the_noise_bound():
    """The same guess of x0, said as a velocity, has the same bound; the squared error is that of ε over ᾱ."""
    batch = case()
    eps_hat, v = np.split(batch["model_output"], 2, axis=-1)
    t = np.array([0, 1, 20, 500, 900])
    batch["x_t"] = np.asarray(process.add_noise(FULL, batch["x0"], t, batch["eps"]))
    said_as_eps = hybrid_loss(FULL, **batch, t=t)
    velocity = process.v_from_x0_eps(FULL, process.x0_from_eps(FULL, batch["x_t"], t, eps_hat), t, eps_hat)
    batch["model_output"] = np.concatenate([velocity, v], axis=-1)
    said_as_v = hybrid_loss(FULL, **batch, t=t, prediction="v")
    np.testing.assert_allclose(said_as_v["vb"], said_as_eps["vb"], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(said_as_v["mse"], said_as_eps["mse"] / FULL.alpha_bar[t], rtol=1e-3)


def test_loss_is_its_parts():
    batch = case()
    got = hybrid_loss(FULL, **batch, t=T)
    mse = np.mean((batch["model_output"][..., :3].astype(np.float64) - batch["eps"]) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(got["mse"], mse, rtol=1e-5)
    np.testing.assert_allclose(got["loss"], got["mse"] + got["vb"], rtol=1e-6)
    assert all(value.shape == (len(T),) and value.dtype == jnp.float32 for value in got.values())


def test_bound_counts_by_the_length_of_the_chain():
    schedule = respace(FULL, parse_steps("smart50"))
    t = np.array([0, 1, 10, 30, 49])
    batch = case()
    batch["x_t"] = np.asarray(process.add_noise(schedule, batch["x0"], t, batch["eps"]))
    got = hybrid_loss(schedule, **batch, t=t)
    np.testing.assert_allclose(got["loss"] - got["mse"], got["vb"] * 0.05, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_bound_trains_the_variance_only(prediction):
    batch = case()
    out = batch.pop("model_output")
    if prediction == "x0":
        out = np.concatenate([batch["x0"] + 0.01, out[..., 3:]], axis=-1).astype(np.float32)

    def part(out, name):
        return hybrid_loss(FULL, out, **batch, t=T, prediction=prediction)[name].sum()

    grad_vb = jax.grad(part)(out, "vb")
    assert np.all(np.asarray(grad_vb[..., :3]) == 0)  # exactly
    assert np.all(np.abs(grad_vb[..., 3:]).max(axis=(1, 2, 3)) > 0)  # at every step, t = 0 included
    grad_mse = jax.grad(part)(out, "mse")
    assert np.all(np.asarray(grad_mse[..., 3:]) == 0)
    target = process.prediction_target(FULL, prediction, batch["x0"], T, batch["eps"])
    np.testing.assert_allclose(grad_mse[..., :3], 2 * (out[..., :3] - target) / 60, rtol=1e-4, atol=1e-7)


def test_perfect_prediction_costs_nothing():
    batch = case()
    batch["model_output"] = np.concatenate([batch["eps"], -np.ones(SHAPE, np.float32)], axis=-1)  # v = −1: β̃
    got = hybrid_loss(FULL, **batch, t=T)
    np.testing.assert_array_equal(got["mse"], 0)
    np.testing.assert_allclose(got["vb"][1:], 0, atol=1e-6)
    assert 0 < got["vb"][0] < 3  # a level is never certain: the decoder has a standard deviation


def test_best_variance_is_the_true_error():
    """L_vb over σ² has its minimum at β̃ + (mean error)², so the head learns how wrong x̂0 is."""
    t = np.array([20])
    x0 = x_t = np.zeros((1, 1, 1, 1))
    v = np.linspace(-1, 1, 2001)
    x0_hat = np.full((1, 1, 1, 1), 0.03)
    of_v = jax.vmap(lambda v: losses.variational_bound(FULL, x0_hat, v.reshape(1, 1, 1, 1), x0, x_t, t)[0])
    bound = jax.jit(of_v)(jnp.asarray(v, jnp.float32))
    log_variance = process.learned_range_log_variance(FULL, v.reshape(1, -1, 1, 1).astype(np.float32), t).ravel()
    best = math.log(float(FULL.posterior_variance[20]) + (0.03 * float(FULL.posterior_coef_x0[20])) ** 2)
    assert float(log_variance[0]) < best - 0.01 and best + 0.01 < float(log_variance[-1])
    assert float(log_variance[int(jnp.argmin(bound))]) == pytest.approx(best, abs=5e-3)


def test_levels_share_all_the_mass():
    """The 256 levels partition the line: their probabilities sum to 1, for a mean inside or at the edge."""
    levels = (np.arange(256) / 127.5 - 1).astype(np.float32)
    log_likelihood = jax.jit(losses.discretized_gaussian_log_likelihood)
    for mean, std in [(0.0, 0.1), (0.99, 0.05), (-1.2, 0.3)]:
        log_p = log_likelihood(levels, mean, 2 * math.log(std))
        assert float(jnp.exp(log_p).sum()) == pytest.approx(1, abs=1e-5)
    exact = math.log(math.erf(0.5 / 255 * 2 / 0.1 / math.sqrt(2)))  # the level at the mean; the tanh form is near
    assert float(losses.discretized_gaussian_log_likelihood(0.0, 0.0, 2 * math.log(0.1))) == pytest.approx(
        exact, abs=1e-3
    )


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_gradients_stay_finite_for_a_net_that_outputs_nonsense(scale):
    batch = case()
    out = scale * np.random.default_rng(3).standard_normal(batch.pop("model_output").shape).astype(np.float32)
    mean_loss = jax.jit(jax.value_and_grad(lambda out: losses.hybrid_loss(FULL, out, **batch, t=T)["loss"].mean()))
    loss, grad = mean_loss(out)
    assert np.isfinite(loss) and np.all(np.isfinite(grad))


def test_half_precision_outputs_are_judged_in_float32():
    batch = case()
    half = jnp.asarray(batch["model_output"], jnp.bfloat16)
    got = hybrid_loss(FULL, **{**batch, "model_output": half}, t=T)
    want = hybrid_loss(FULL, **{**batch, "model_output": half.astype(jnp.float32)}, t=T)
    for name in want:
        assert got[name].dtype == jnp.float32
        np.testing.assert_array_equal(got[name], want[name])


STEPS = np.array([0, 1, 100, 300, 500, 700, 900, 998])


@pytest.mark.parametrize("weight", ["none", "min-snr", "sigmoid"])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_weights_are_their_formulas(prediction, weight):
    log_snrs = [math.log(a) - math.log(1 - a) for a in np.asarray(FULL.alpha_bar, np.float64)]
    for t in STEPS:
        log_snr, snr = log_snrs[t], math.exp(log_snrs[t])
        low, high = max(t - 1, 0), t + 1
        spacing = (log_snrs[low] - log_snrs[high]) * 1000 / (high - low) / (2 * math.pi)
        sigmoid = spacing / (1 + math.exp(log_snr - 2))
        if 100 <= t <= 900:
            assert spacing == pytest.approx(math.cosh(log_snr / 2), rel=0.02)
        expected = {
            "none": {"eps": 1.0, "v": 1.0, "x0": 1.0},
            "min-snr": {"eps": min(snr, 5) / snr, "v": min(snr, 5) / (snr + 1), "x0": min(snr, 5)},
            "sigmoid": {"eps": sigmoid, "v": sigmoid * snr / (snr + 1), "x0": sigmoid * snr},
        }[weight][prediction]
        got = losses.loss_weight(FULL, prediction, weight, np.array([t]))
        assert got.shape == (1,) and got.dtype == jnp.float32
        # 1 − ᾱ of the float32 table has few digits at the clean end
        assert float(got[0]) == pytest.approx(expected, rel=1e-5), t


@pytest.mark.parametrize("size", [32, 256])
def test_sigmoid_weighs_noise_levels_alike_along_any_schedule(size):
    """Summed over the steps, an ε error that depends on the noise level alone weighs the same, shifted or not."""

    def total(schedule):
        alpha_bar = np.asarray(schedule.alpha_bar, np.float64)
        log_snr = np.log(alpha_bar / (1 - alpha_bar))
        error = np.exp(-((log_snr - 1) ** 2))
        return np.mean(np.asarray(losses.loss_weight(schedule, "eps", "sigmoid", np.arange(1000))) * error)

    assert total(schedule_from_betas(cosine_betas(size=size))) == pytest.approx(total(FULL), rel=1e-3)


@pytest.mark.parametrize("weight", ["min-snr", "sigmoid"])
def test_one_guess_of_x0_costs_the_same_however_it_is_said(weight):
    t = STEPS[:5]
    batch = case()
    x_t = process.add_noise(FULL, batch["x0"], t, batch["eps"])
    guess = batch["x0"] + 0.3 * np.random.default_rng(7).standard_normal(SHAPE).astype(np.float32)
    eps_hat = process.eps_from_x0(FULL, x_t, t, guess)
    said = {"eps": eps_hat, "v": process.v_from_x0_eps(FULL, guess, t, eps_hat), "x0": guess}
    costs = {}
    for prediction, predicted in said.items():
        out = jnp.concatenate([predicted, jnp.zeros(SHAPE)], -1)
        got = losses.hybrid_loss(FULL, out, batch["x0"], x_t, batch["eps"], t, prediction=prediction, weight=weight)
        costs[prediction] = got["loss"] - got["vb"]
        np.testing.assert_allclose(
            costs[prediction], losses.loss_weight(FULL, prediction, weight, t) * got["mse"], rtol=1e-3, atol=1e-5
        )
    # ε̂ from x_t at t = 0 is a small difference of large numbers
    np.testing.assert_allclose(costs["v"], costs["x0"], rtol=2e-3)
    np.testing.assert_allclose(costs["eps"][1:], costs["x0"][1:], rtol=2e-3)


def test_weights_leave_the_bound_alone():
    batch = case()
    plain, weighted = (losses.hybrid_loss(FULL, **batch, t=T, weight=weight) for weight in ("none", "min-snr"))
    np.testing.assert_array_equal(plain["vb"], weighted["vb"])
    np.testing.assert_array_equal(plain["mse"], weighted["mse"])
    np.testing.assert_allclose(plain["loss"], plain["mse"] + plain["vb"], rtol=1e-6)


def test_unknown_weights_are_refused():
    with pytest.raises(ValueError, match="loss weight is 'snr': use one of none, min-snr, sigmoid"):
        losses.loss_weight(FULL, "eps", "snr", T)
    with pytest.raises(ValueError, match="outside any compiled function"):
        jax.jit(lambda schedule: losses.loss_weight(schedule, "eps", "min-snr", T))(FULL)
