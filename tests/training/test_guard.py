"""The guard: what it leaves out leaves no trace but its counters, and a run that cannot recover stops with one line."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from if_jax.config import GuardConfig, Recipe
from if_jax.training.metrics import Window
from if_jax.training.step import init_state, make_step

GUARD = GuardConfig(spike_factor=5.0, grace_steps=4, max_in_a_row=3)
TX = optax.adam(1e-2)
DECAYS = (0.9, 0.5)


def _loss(params, frozen, batch, key):
    """The gradient is the batch's scale times a direction."""
    loss = jnp.sum(params["w"] * batch["direction"]) * batch["scale"]
    return loss, {"loss": loss}


step = jax.jit(make_step(_loss, TX, DECAYS, 0, GUARD))


def _batch(scale):
    return {"direction": np.array([0.6, 0.8], np.float32), "scale": np.float32(scale)}


def _state():
    return init_state({"w": jnp.ones(2)}, TX, DECAYS)


def _after(*scales, state=None, step=step):
    state, metrics = state or _state(), []
    for scale in scales:
        state, row = step(state, {}, _batch(scale))
        metrics.append(row)
    return state, metrics


def _kept(state):
    return jax.tree.leaves((state.params, state.ema, state.opt_state))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 5.2, 1e30])
def test_what_is_left_out_changes_nothing_but_the_counters(bad):
    good, _ = _after(1, 1, 1, 1)
    after, metrics = _after(bad, state=good)
    for expected, actual in zip(_kept(good), _kept(after), strict=True):
        np.testing.assert_array_equal(expected, actual)
    assert int(after.step) == 5  # the batch counts as seen: a resumed run goes on with the next one
    assert dataclasses.asdict(jax.device_get(after.guard)) == {"norm": 1.0, "accepted": 4, "skipped": 1, "in_a_row": 1}
    assert int(metrics[0]["skipped"]) == int(metrics[0]["skipped_in_a_row"]) == 1
    assert float(metrics[0]["param_norm"]) == float(optax.tree.norm(good.params))


def test_a_gradient_that_is_not_finite_is_left_out_though_the_loss_is():
    def kink(params, frozen, batch, key):
        loss = jnp.sum(jnp.sqrt(jnp.maximum(params["w"], 0)))  # a finite loss at 0, of infinite slope
        return loss, {"loss": loss}

    state = init_state({"w": jnp.array([0.0, 1.0])}, TX, DECAYS)
    after, metrics = jax.jit(make_step(kink, TX, DECAYS, 0, GUARD))(state, {}, _batch(1))
    assert np.isfinite(metrics[("loss")]) and not np.isfinite(metrics["grad_norm"])
    assert int(after.guard.skipped) == 1
    np.testing.assert_array_equal(after.params["w"], state.params["w"])


def test_a_good_step_ends_the_row_and_only_the_row():
    state, metrics = _after(1, np.nan, np.inf, 1, np.nan, 1)
    assert [int(row["skipped_in_a_row"]) for row in metrics] == [0, 1, 2, 0, 1, 0]
    assert [int(row["skipped"]) for row in metrics] == [0, 1, 2, 2, 3, 3]
    assert int(state.guard.accepted) == 3


def test_what_is_left_out_is_as_if_it_had_not_been():
    """Moments, averages and the averages' warm-up go by updates made."""
    with_gap, _ = _after(1, 2, np.nan, 3)
    without, _ = _after(1, 2, 3)
    for expected, actual in zip(_kept(with_gap), _kept(without), strict=True):
        np.testing.assert_array_equal(expected, actual)
    assert float(with_gap.guard.norm) == float(without.guard.norm)


def test_grace_accepts_any_finite_gradient():
    state, _ = _after(1, 100, 1, 1e6)
    assert int(state.guard.skipped) == 0
    state, _ = _after(1, 1, 1, 5.2)
    assert int(state.guard.skipped) == 0
    state, _ = _after(1, 1, 1, 1, 5.2)
    assert int(state.guard.skipped) == 1


def test_the_average_follows_accepted_gradients():
    state, _ = _after(1, 2, 3, 4)
    assert float(state.guard.norm) == pytest.approx(2.5)  # a plain mean while young
    state, _ = _after(12, 13, state=state)  # below and above 5 × the average of (10 + 12) / 5 = 4.4 → 22
    assert int(state.guard.skipped) == 0
    state, _ = _after(1e3, state=state)
    assert int(state.guard.skipped) == 1 and float(state.guard.norm) == pytest.approx(35 / 6)


def test_without_a_factor_only_what_is_not_finite_is_left_out():
    lax = jax.jit(make_step(_loss, TX, DECAYS, 0, dataclasses.replace(GUARD, spike_factor=0.0)))
    state, _ = _after(1, 1, 1, 1, 1, 1e6, step=lax)
    assert int(state.guard.skipped) == 0
    state, _ = _after(np.nan, state=state, step=lax)
    assert int(state.guard.skipped) == 1


def test_accumulated_parts_are_judged_together():
    """One bad row in one part leaves out the whole update."""

    def mean_loss(params, frozen, batch, key):
        loss = jnp.mean(batch["x"]) * params["w"].sum()
        return loss, {"loss": loss}

    x = np.ones(8, np.float32)
    x[5] = np.nan
    accumulated = jax.jit(make_step(mean_loss, TX, DECAYS, 0, GUARD, accumulate=4))
    state, _ = accumulated(_state(), {}, {"x": x})
    assert int(state.guard.skipped) == 1
    np.testing.assert_array_equal(state.params["w"], 1)


RECIPE = Recipe(log_every=2, guard=GUARD, batch_size=4)


def _row(**changed):
    row = {"loss": 1.0, "grad_norm": 2.0, "skipped": 0, "skipped_in_a_row": 0, "input_wait": 0.0}
    row |= {"mse_sum_by_t": np.array([1.0, 4.0, 0.0, 2.0]), "count_by_t": np.array([1.0, 2.0, 0.0, 1.0])}
    return row | changed


def _window():
    return Window(RECIPE, lambda updates: 10.0 + updates, flops=1e9)


def test_a_window_reports_means_and_what_was_left_out():
    window = _window()
    assert window.add(1, _row(loss=1.0)) is None
    report = window.add(2, _row(loss=2.0, skipped=1))
    assert report["loss"] == 1.5 and report["skipped"] == 1
    assert report["learning_rate"] == 10.0  # of the one update that was made, the first
    assert "skipped_in_a_row" not in report
    assert report["images_per_second"] == pytest.approx(4 / report["step_seconds"])
    assert {name: report[name] for name in report if name.startswith("mse_t")} == {
        "mse_t0-249": 1.0,
        "mse_t250-499": 2.0,
        "mse_t750-999": 2.0,
    }  # sums by counts; no timestep of the third quarter was drawn
    assert all(isinstance(value, int | float) for value in report.values())
    window.add(3, _row(loss=5.0))
    assert window.add(4, _row(loss=7.0))["loss"] == 6.0  # a window forgets the one before


def test_a_bad_step_does_not_spoil_the_means_of_its_window():
    window = _window()
    window.add(1, _row(loss=3.0))
    bad = _row(loss=np.nan, grad_norm=np.nan, skipped=1, skipped_in_a_row=1, mse_sum_by_t=np.full(4, np.nan))
    report = window.add(2, bad)
    assert report["loss"] == 3.0 and report["skipped"] == 1
    assert report["mse_t0-249"] == 1.0 and report["mse_t250-499"] == 2.0
    window.add(3, bad)
    assert np.isnan(window.add(4, bad)["loss"])  # nothing finite to tell of


def test_too_many_in_a_row_stop_the_run_with_one_line():
    window = _window()
    window.add(1, _row(skipped=1, skipped_in_a_row=1))
    window.add(2, _row(skipped=2, skipped_in_a_row=2))
    message = (
        r"3 updates in a row were left out, the last at step 3 with loss nan and gradient norm 1e\+09: .*checkpoint"
    )
    with pytest.raises(FloatingPointError, match=message) as caught:
        window.add(3, _row(loss=np.nan, grad_norm=1e9, skipped=3, skipped_in_a_row=3))
    assert "\n" not in str(caught.value)
