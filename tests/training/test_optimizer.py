"""Optimizers and learning rates: each one learns, places its state, keeps it in float32, and decays what it should."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from if_jax.config import DataConfig, OptimizerConfig, Recipe
from if_jax.config.keys import Dtype, OptimizerName
from if_jax.models import presets
from if_jax.parallel import mesh as meshes
from if_jax.parallel import rules
from if_jax.training import objective, optimizer, randomness
from if_jax.training.step import init_state, make_step

# Less optimisation of machine code, for programs that run a few times.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
MESH_RULES = rules.PRESETS["fsdp_tp"]


def _params(key):
    """A kernel that Adafactor factors, a small one, a convolution's, a table and a bias; boxed as the nets' are."""
    keys, box = jax.random.split(key, 4), nn.LogicallyPartitioned
    return {
        "wide": {"kernel": box(jax.random.normal(keys[0], (128, 256)) / 12, ("in", "out")), "bias": jnp.ones(256)},
        "small": {"kernel": box(jax.random.normal(keys[1], (16, 8)) / 4, ("in", "out"))},
        "conv": {"kernel": box(jax.random.normal(keys[2], (3, 3, 8, 16)) / 9, (None, None, "in", "out"))},
        "table": {"embedding": box(jax.random.normal(keys[3], (32, 16)), ("vocab", "embed"))},
    }


PARAMS = jax.jit(_params, compiler_options=QUICK)(jax.random.key(0))


def _config(name, **settings):
    return OptimizerConfig(**{"name": name, "learning_rate": 0.03, "warmup_steps": 0, **settings})


def _leaves(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _loss(params, frozen, batch, key):
    """How far the weights are from others, which all of them can reach."""
    targets = jax.tree.map(jnp.cos, jax.tree.map(lambda leaf: jnp.arange(leaf.size).reshape(leaf.shape) * 0.1, params))
    loss = sum(jnp.mean((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (params, targets)), strict=True))
    return loss, {"loss": loss}


@pytest.mark.parametrize("boxed", [True, False])
@pytest.mark.parametrize("name", get_args(OptimizerName))
def test_every_optimizer_learns(name, boxed):
    tx = optimizer.make_optimizer(_config(name), 100)
    params = PARAMS if boxed else nn.meta.unbox(PARAMS)
    state = jax.jit(lambda params: init_state(params, tx, (0.5,)), compiler_options=QUICK)(params)
    step = jax.jit(make_step(_loss, tx, (0.5,), 0), compiler_options=QUICK)
    start, losses = state, []
    for _ in range(12):
        state, metrics = step(state, {}, {})
        losses.append(float(metrics["loss"]))
    assert np.all(np.diff(losses) < 0) and losses[-1] < 0.8 * losses[0]
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), start.params, state.params)
    assert min(jax.tree.leaves(moved)) > 0.01  # every kind of weight
    assert jax.tree.structure(state) == jax.tree.structure(start)


@pytest.mark.parametrize("name", get_args(OptimizerName))
def test_states_lie_where_their_weights_do(name):
    """From boxed shapes to a state made in place on the mesh, which an update leaves where it is."""
    mesh = meshes.make_mesh(2, 2, 2)
    tx = optimizer.make_optimizer(_config(name, weight_decay=0.1), 10)

    def fresh(key):
        return init_state(_params(key), tx, (0.5,))

    boxed = jax.eval_shape(fresh, jax.random.key(0))
    places = rules.state_shardings(boxed, mesh, MESH_RULES)
    assert jax.tree.structure(places) == jax.tree.structure(nn.meta.unbox(boxed))
    for path, place in _leaves(places.opt_state).items():
        if "v_row" in path or "v_col" in path:  # factored: rows and columns, or a placeholder
            assert place.spec == P(), path
    named = {path: place for path, place in _leaves(places.opt_state).items() if "['small']['kernel']" in path}
    full = {path for path, place in named.items() if place.spec == P(("fsdp",), ("tensor",))}
    assert {path.split(".")[-1].split("[")[0] for path in full} == {"adamw": {"mu", "nu"}, "muon": {"mu"}}.get(
        name, {"v"}
    )
    step = make_step(_loss, tx, (0.5,), 0)

    def fresh_and_after(key):
        state = nn.meta.unbox(fresh(key))
        return state, step(state, {}, {})[0]

    with jax.set_mesh(mesh):
        made = jax.jit(fresh_and_after, out_shardings=(places, places), compiler_options=QUICK)
        state, after = made(jax.random.key(0))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert after.params["small"]["kernel"].sharding.spec == P(("fsdp",), ("tensor",))


def test_adafactor_keeps_rows_and_columns_of_what_is_large():
    params = nn.meta.unbox(PARAMS)
    state = optimizer.make_optimizer(_config("adafactor"), 10).init(params)
    sizes = {path: leaf.size for path, leaf in _leaves(state).items() if "['wide']['kernel']" in path}
    assert sorted(sizes.values()) == [1, 128, 256]


def test_muon_turns_kernels_and_nothing_else():
    """Kernels get updates with equal singular values, as matrices of (taps × in, out); the rest goes by Adam."""
    params = nn.meta.unbox(PARAMS)
    tx = optimizer.make_optimizer(_config("muon", clip_norm=1e9), 10)
    state = tx.init(params)
    turned = {path for path in _leaves(state) if "['muon']" in path and ".mu" in path}
    assert len(turned) == 3 and all("['kernel']" in path for path in turned)
    by_adam = {path for path in _leaves(state) if "['adam']" in path and ".mu" in path}
    assert len(by_adam) == 2 and all("['bias']" in path or "['embedding']" in path for path in by_adam)
    grads = jax.tree.map(lambda leaf: jnp.asarray(np.random.default_rng(0).standard_normal(leaf.shape)), params)
    update = jax.jit(tx.update, compiler_options=QUICK)
    updates, _ = update(jax.tree.map(jnp.float32, grads), state, params)
    rate = float(optimizer.learning_rate_schedule(_config("muon"), 10)(0))
    for name in ("small", "conv", "wide"):
        update = np.asarray(updates[name]["kernel"])
        singular = np.linalg.svd(update.reshape(-1, update.shape[-1]), compute_uv=False)
        assert singular.max() / singular.min() < 2.5, name  # Newton-Schulz stops at a band around 1
        rms = float(np.sqrt(np.mean(update**2)))
        assert rms == pytest.approx(0.2 * rate, rel=0.35), name  # one rate for every shape, and for Adam's part
    for by_sign in (updates["table"]["embedding"], updates["wide"]["bias"]):  # the first step, with Nesterov's momentum
        assert np.ptp(np.abs(by_sign)) < 1e-3 * rate and rate <= np.abs(by_sign).max() < 1.5 * rate


@pytest.mark.parametrize("name", get_args(OptimizerName))
def test_weight_decay_spares_vectors_and_goes_with_the_rate(name):
    params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
    zero = jax.tree.map(jnp.zeros_like, params)
    tx = optimizer.make_optimizer(_config(name, weight_decay=0.5), 10)
    updates, _ = tx.update(zero, tx.init(params), params)
    np.testing.assert_array_equal(updates["bias"], 0)
    np.testing.assert_allclose(updates["kernel"], -0.03 * 0.5, rtol=1e-5)
    none = optimizer.make_optimizer(_config(name), 10)
    updates, _ = none.update(zero, none.init(params), params)
    np.testing.assert_array_equal(updates["kernel"], 0)


@pytest.mark.parametrize("name", get_args(OptimizerName))
def test_a_large_gradient_is_clipped_to_the_norm(name):
    """Twice the gradient beyond the norm makes the same update, also in the moments."""
    params = {"kernel": jnp.ones((4, 3))}
    tx = optimizer.make_optimizer(_config(name, clip_norm=1.0), 10)
    grads = {"kernel": jnp.arange(12.0).reshape(4, 3) - 3}
    states = [tx.update(jax.tree.map(lambda g, f=f: f * g, grads), tx.init(params), params)[1] for f in (1, 2)]
    for small, large in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(small, large, rtol=1e-6)


@pytest.fixture(scope="module")
def tiny_recipe():
    """In bfloat16, of one level; with its boxed weights as shapes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.UNETS, "tiny-I", tiny.one_level(tiny.BASE))
        recipe = Recipe(unet="tiny-I", batch_size=8, compute_dtype="bfloat16", data=DataConfig(size=8))
        networks = objective.make_networks(recipe, tiny.TEXT)
        params = jax.eval_shape(lambda key: objective.init_params(networks, recipe, key), jax.random.key(0))
        yield recipe, networks, params


def _assert_state_is_float32(state, name, moment_dtype):
    leaves = _leaves(state)
    moments = {path for path in leaves if ".mu" in path}
    assert bool(moments) == (name != "adafactor")
    halved = {path for path, leaf in leaves.items() if leaf.dtype == jnp.bfloat16}
    assert halved == (moments if moment_dtype == "bfloat16" else set())
    assert {leaf.dtype.name for path, leaf in leaves.items() if path not in halved} == {"float32", "int32"}


@pytest.mark.parametrize("moment_dtype", get_args(Dtype))
@pytest.mark.parametrize("name", get_args(OptimizerName))
def test_the_state_is_float32_whatever_is_computed_in(name, moment_dtype, tiny_recipe):
    """Before and after a step, all of it but the first moments where the recipe asks; the weights are the nets'."""
    _, _, params = tiny_recipe
    tx = optimizer.make_optimizer(_config(name, moment_dtype=moment_dtype), 10)

    def half_loss(params, frozen, batch, key):
        loss = sum(jnp.sum(leaf.astype(jnp.bfloat16) ** 2) for leaf in jax.tree.leaves(params)).astype(jnp.float32)
        return loss, {"loss": loss}

    before = nn.meta.unbox(jax.eval_shape(lambda params: init_state(params, tx, (0.99, 0.9)), params))
    after, _ = jax.eval_shape(make_step(half_loss, tx, (0.99, 0.9), 0), before, {}, {})
    for state in (before, after):
        _assert_state_is_float32(state, name, moment_dtype)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), before) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), after
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_in_bfloat16_keeps_a_float32_state(accumulate, tiny_recipe):
    recipe, networks, params = tiny_recipe
    assert networks.unet.dtype == networks.text_encoder.dtype == jnp.bfloat16
    tx = optimizer.make_optimizer(recipe.optimizer, 10)
    before = nn.meta.unbox(jax.eval_shape(lambda params: init_state(params, tx, (0.99,)), params))
    words = jax.ShapeDtypeStruct((8, 9), np.int32)
    batch = {"image": jax.ShapeDtypeStruct((8, 8, 8, 3), np.uint8), "ids": words, "mask": words}
    draw = functools.partial(randomness.draw, recipe, 8)
    step = make_step(objective.make_loss(networks, recipe), tx, (0.99,), 0, accumulate=accumulate, draw=draw)
    after, metrics = jax.eval_shape(step, before, {}, batch)
    _assert_state_is_float32(after, "adamw", "float32")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(metrics)} == {"float32", "int32"}


def test_schedule_warms_up_and_ends():
    config = OptimizerConfig(learning_rate=1e-3, final_learning_rate=1e-5, warmup_steps=10)
    schedule = optimizer.learning_rate_schedule(config, 110)
    assert float(schedule(0)) == 0
    np.testing.assert_allclose([schedule(5), schedule(10), schedule(110)], [5e-4, 1e-3, 1e-5], rtol=1e-5)
    assert float(schedule(60)) == pytest.approx((1e-3 + 1e-5) / 2, rel=1e-5)  # half a cosine down


def test_one_cycle_is_the_one_if_was_trained_with():
    """From 2e-6 over 5e-5 after 10 000 steps to 5e-9, half a cosine each way."""
    config = OptimizerConfig(
        schedule="one-cycle",
        initial_learning_rate=2e-6,
        learning_rate=5e-5,
        final_learning_rate=5e-9,
        warmup_steps=10_000,
    )
    end = 1_000_000
    schedule = optimizer.learning_rate_schedule(config, end)
    np.testing.assert_allclose([schedule(0), schedule(10_000)], [2e-6, 5e-5], rtol=1e-5)
    assert float(schedule(end)) == pytest.approx(5e-9, rel=1e-3)  # float32: 5e-5 · (1 + cos π) leaves a little
    assert float(schedule(5_000)) == pytest.approx((2e-6 + 5e-5) / 2, rel=1e-5)
    assert float(schedule((10_000 + end) // 2)) == pytest.approx((5e-5 + 5e-9) / 2, rel=1e-5)
    quarter = 2e-6 + (5e-5 - 2e-6) * (1 - math.cos(math.pi / 4)) / 2
    assert float(schedule(2_500)) == pytest.approx(quarter, rel=1e-5)
    rates = jax.vmap(schedule)
    assert np.all(np.diff(rates(jnp.arange(0, 10_001, 100))) > 0)
    assert np.all(np.diff(rates(jnp.linspace(10_000, end, 100).astype(jnp.int32))) < 0)


def test_a_constant_rate_stays_after_warm_up():
    config = OptimizerConfig(schedule="constant", learning_rate=3e-4, warmup_steps=4, final_learning_rate=1.0)
    schedule = optimizer.learning_rate_schedule(config, 20)
    np.testing.assert_allclose([schedule(k) for k in (0, 2, 4, 11, 20, 500)], [0, *[1.5e-4], *[3e-4] * 4], rtol=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "one-cycle", "constant"])
def test_schedules_without_warm_up_and_of_one_step(kind):
    config = OptimizerConfig(schedule=kind, learning_rate=2e-4, warmup_steps=0)
    assert float(optimizer.learning_rate_schedule(config, 10)(0)) == pytest.approx(2e-4)
    longer = optimizer.learning_rate_schedule(dataclasses.replace(config, warmup_steps=100), 1)  # longer than the run
    assert float(longer(0)) == pytest.approx(2e-4)
