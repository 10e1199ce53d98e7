"""The schedule: reference values, identities between its tables, respacing and step lists."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from if_jax.checkpoints.scheduler import SchedulerConfig, scheduler_from_diffusers, scheduler_to_diffusers
from if_jax.diffusion.schedule import (
    STEP_LISTS,
    Schedule,
    cosine_betas,
    cosine_schedule,
    parse_steps,
    respace,
    schedule_from_betas,
)

pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
published = pytest.importorskip("diffusers.pipelines.deepfloyd_if.timesteps")

FULL = cosine_schedule()


def tables_of(schedule: Schedule) -> dict[str, np.ndarray]:
    return {field.name: getattr(schedule, field.name) for field in dataclasses.fields(schedule)}


def reference_alpha_bar(num_timesteps: int = 1000) -> list[float]:
    """ᾱ one step at a time in Python floats, β and α rounded to float32 as schedulers store them."""
    alpha_bar, product = [], 1.0
    for i in range(num_timesteps):
        f0, f1 = (math.cos((u / num_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (i, i + 1))
        beta = np.float32(min(1 - f1 / f0, 0.999))
        product *= float(np.float32(1) - beta)
        alpha_bar.append(product)
    return alpha_bar


def test_betas_are_the_published_ones():
    betas = cosine_betas()
    known = {
        0: 4.128422482196914e-05,
        1: 4.614175273665033e-05,
        499: 3.1458862304780677e-03,
        998: 0.7499993929011166,
        999: 0.999,
    }
    for i, value in known.items():
        assert betas[i] == pytest.approx(value, rel=1e-9)
    assert np.argmax(betas) == 999 and np.sum(betas >= 0.999) == 1  # only the last one reaches the cap
    alpha_bar = np.cumprod(1 - betas)
    assert alpha_bar[250] == pytest.approx(0.8458879864968832, rel=1e-12)
    assert alpha_bar[499] == pytest.approx(0.4938435904406382, rel=1e-12)
    assert alpha_bar[999] == pytest.approx(2.42876690703e-09, rel=1e-9)


def test_alpha_bar_is_bit_identical_to_diffusers():
    reference = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.numpy()
    assert FULL.alpha_bar.dtype == np.float32
    np.testing.assert_array_equal(FULL.alpha_bar, reference)


def test_trained_betas_are_bit_identical_to_diffusers():
    betas = np.linspace(1e-4, 0.02, 40).tolist()
    reference = diffusers.DDPMScheduler(trained_betas=betas).alphas_cumprod.numpy()
    np.testing.assert_array_equal(schedule_from_betas(betas).alpha_bar, reference)


@pytest.mark.parametrize("size", [128, 256, 32])
def test_a_larger_picture_is_noised_more_by_a_constant(size):
    """ln SNR at every step differs by 2 ln(64 / size), up to the first step that reaches the cap on β."""

    def log_snr(betas):
        alpha_bar = np.cumprod(1 - betas)
        return np.log(alpha_bar) - np.log1p(-alpha_bar)

    plain, shifted = cosine_betas(), cosine_betas(size=size)
    free = np.cumsum((plain >= 0.999) | (shifted >= 0.999)) == 0
    assert free.sum() >= 998
    difference = log_snr(shifted)[free] - log_snr(plain)[free]
    np.testing.assert_allclose(difference, 2 * math.log(64 / size), atol=1e-6)


def test_the_size_of_the_first_stage_shifts_nothing():
    np.testing.assert_array_equal(cosine_betas(size=64), cosine_betas())


@pytest.mark.parametrize("size", [64, 256])
def test_a_published_schedule_is_bit_identical_to_diffusers(size):
    """Through the configuration as a release stores it."""
    config = SchedulerConfig(1.0, trained_betas=tuple(cosine_betas(size=size).tolist()))
    stored = json.loads(json.dumps(scheduler_to_diffusers(config)))
    reference = diffusers.DDPMScheduler.from_config(stored).alphas_cumprod.numpy()
    np.testing.assert_array_equal(config.schedule().alpha_bar, reference)
    assert scheduler_from_diffusers(stored) == config
    own = schedule_from_betas(cosine_betas(size=size))  # what the stage was trained along
    np.testing.assert_array_equal(own.alpha_bar, reference)


def test_trained_betas_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"trained_betas holds 3 numbers"):
        SchedulerConfig(1.0, trained_betas=(0.1, 0.2, 0.3))


@pytest.mark.parametrize("steps", [None, *STEP_LISTS, [0, 999], [0, 1, 2], [7]])
def test_tables_follow_their_definitions(steps):
    schedule = FULL if steps is None else respace(FULL, parse_steps(steps))
    full = reference_alpha_bar()
    previous = 1.0
    for i, t in enumerate(schedule.timesteps):
        a, p = full[t], previous
        beta = 1 - a / p
        expected = dict(
            alpha_bar=a,
            alpha_bar_prev=p,
            beta=beta,
            log_beta=math.log(beta),
            sqrt_alpha_bar=math.sqrt(a),
            sqrt_one_minus_alpha_bar=math.sqrt(1 - a),
            posterior_variance=beta * (1 - p) / (1 - a),
            posterior_coef_x0=math.sqrt(p) * beta / (1 - a),
            posterior_coef_xt=math.sqrt(a / p) * (1 - p) / (1 - a),
        )
        if i > 0:
            expected["posterior_log_variance"] = math.log(expected["posterior_variance"])
        for name, value in expected.items():
            assert getattr(schedule, name)[i] == pytest.approx(value, rel=3e-7), (name, i)
        previous = a
    assert schedule.posterior_log_variance[0] == schedule.posterior_log_variance[min(1, schedule.num_steps - 1)]
    for name, table in tables_of(schedule).items():
        assert table.shape == (schedule.num_steps,) and np.all(np.isfinite(table)), name
        assert table.dtype == (np.int32 if name == "timesteps" else np.float32), name


def test_respacing_to_every_step_changes_nothing():
    for name, table in tables_of(respace(FULL, range(1000))).items():
        np.testing.assert_array_equal(table, getattr(FULL, name), err_msg=name)


@pytest.mark.parametrize("name", STEP_LISTS)
def test_respaced_chain_keeps_the_marginals(name):
    schedule = respace(FULL, parse_steps(name))
    np.testing.assert_array_equal(schedule.alpha_bar, FULL.alpha_bar[schedule.timesteps])
    # The chain of β' alone leads to the same ᾱ. (1 − β' has few digits where β' is nearly 1, hence all but the end.)
    product = np.cumprod(1 - schedule.beta.astype(np.float64))
    near_one = schedule.beta > 0.99
    np.testing.assert_allclose(product[~near_one], schedule.alpha_bar[~near_one], rtol=1e-5)


def test_respacing_does_not_depend_on_the_order_of_the_steps():
    a, b = respace(FULL, [0, 500, 999]), respace(FULL, [999, 0, 500])
    np.testing.assert_array_equal(a.timesteps, [0, 500, 999])
    for name, table in tables_of(b).items():
        np.testing.assert_array_equal(table, getattr(a, name))


def test_a_respaced_chain_is_not_respaced_again():
    with pytest.raises(ValueError, match="respace the training schedule"):
        respace(respace(FULL, [0, 500, 999]), [0, 1])


def test_equal_lengths_share_one_compilation():
    traces = []

    @jax.jit
    def total(schedule: Schedule) -> jax.Array:
        traces.append(schedule.num_steps)
        return schedule.beta.sum()

    totals = [float(total(respace(FULL, parse_steps(name)))) for name in ("fast27", "smart27", "super27")]
    assert traces == [27] and len(set(totals)) == 3


@pytest.mark.parametrize(
    "name", ["fast27", "smart27", "smart50", "smart100", "smart185", "super27", "super40", "super100"]
)
def test_named_lists_equal_the_published_ones(name):
    np.testing.assert_array_equal(parse_steps(name)[::-1], getattr(published, f"{name}_timesteps"))


@pytest.mark.parametrize(
    ("spec", "count", "head", "tail"),
    [
        ("100", 100, [0, 10, 20], [989, 999]),
        (50, 50, [0, 20, 41], [979, 999]),
        (" 50 ", 50, [0, 20, 41], [979, 999]),
        (1, 1, [0], [0]),
        (1000, 1000, [0, 1, 2], [998, 999]),
        ("10,10,10,10,10,10,10,10,0,0", 80, [0, 11, 22], [788, 799]),  # IF's style transfer: starts at t = 799
        ("20,20,20,20,10,0,0,0,0,0", 90, [0, 5, 10], [488, 499]),  # the noisier half is cut away
        ("ddim25", 25, [0, 40, 80], [920, 960]),
        ("ddim50", 50, [0, 20, 40], [960, 980]),
        ([980, 0, 20], 3, [0, 20, 980], [20, 980]),
        (np.array([3, 1]), 2, [1, 3], [1, 3]),
    ],
)
def test_step_specifications(spec, count, head, tail):
    steps = parse_steps(spec)
    assert steps.dtype == np.int32 and len(steps) == count and np.all(np.diff(steps) > 0)
    assert steps[: len(head)].tolist() == head and steps[-2:].tolist() == tail[-len(steps) :]


def test_sections_of_a_short_chain_take_the_remainder_first():
    assert parse_steps("4,3,3", num_timesteps=10).tolist() == list(range(10))
    assert parse_steps("2,2,2", num_timesteps=10).tolist() == [0, 3, 4, 6, 7, 9]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("smart51", "unknown steps 'smart51'.*smart50"),
        ("10;10", "unknown steps"),
        ("", "unknown steps"),
        (-5, "unknown steps '-5'"),
        ("1001", "has 1000 timesteps, 1001 asked"),
        ("0", "non-empty"),
        ("0,0", "non-empty"),
        ("ddim300", "no integer stride gives 300"),
        ("ddim0", "no integer stride gives 0"),
        ([], "non-empty"),
        ([0.5, 1.0], "whole numbers"),
        ([0, 1000], "0 … 999"),
        ([-1, 5], "0 … 999"),
        ([5, 5, 7], "1 repeated"),
    ],
)
def test_wrong_steps_get_one_clear_line(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_steps(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("betas", [[], [0.1], [0.0, 0.1], [0.1, 1.0], [[0.1, 0.2]], [0.1, float("nan")]])
def test_wrong_betas_are_refused(betas):
    with pytest.raises(ValueError, match="betas must be a list"):
        schedule_from_betas(betas)
