"""The training step: what it optimises, that it does not depend on the devices, and that it can be resumed."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn

from if_jax.config import DataConfig, OptimizerConfig, Recipe
from if_jax.parallel import mesh as meshes
from if_jax.parallel import rules
from if_jax.training import objective, optimizer
from if_jax.training.step import init_state, make_step

TEXT_LENGTH = 9
BASE = Recipe(batch_size=8, data=DataConfig(size=8), optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2))
SUPER_RESOLUTION = dataclasses.replace(
    BASE, stage="super-resolution", text_encoder_from="x", data=DataConfig(size=32, low_size=8, crop=16)
)


def _networks(recipe):
    config = tiny.BASE if recipe.stage == "base" else tiny.SUPER_RESOLUTION
    return objective.Networks(objective.UNet(tiny.one_level(config)), objective.T5Encoder(tiny.TEXT))


def _batch(recipe, seed=0):
    rng = np.random.default_rng(seed)
    side = recipe.data.size
    ids = rng.integers(3, 259, (recipe.batch_size, TEXT_LENGTH), dtype=np.int32)
    image = rng.integers(0, 256, (recipe.batch_size, side, side, 3), dtype=np.uint8)
    return {"image": image, "ids": ids, "mask": np.ones_like(ids)}


def _run(recipe, mesh, preset, steps):
    placed, networks = rules.PRESETS[preset], _networks(recipe)
    tx = optimizer.make_optimizer(recipe.optimizer, 100)
    frozen = {} if recipe.stage == "base" else {"text_encoder": tiny.random_params(tiny.TEXT)}

    def fresh(key):
        return init_state(objective.init_params(networks, recipe, key, TEXT_LENGTH), tx, (0.99,))

    boxed = jax.eval_shape(fresh, jax.random.key(0))
    places = rules.state_shardings(boxed, mesh, placed)
    batch_place, one = rules.batch_sharding(mesh, placed), rules.replicated(mesh)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda key: nn.meta.unbox(fresh(key)), out_shardings=places)(jax.random.key(0))
        step = jax.jit(
            make_step(objective.make_loss(networks, recipe), tx, (0.99,), 1),
            in_shardings=(places, one, batch_place),
            out_shardings=(places, one),
        )
        losses = []
        for k in range(steps):
            state, metrics = step(state, jax.device_put(frozen, one), jax.device_put(_batch(recipe, k), batch_place))
            losses.append(float(metrics["loss"]))
    return jax.device_get(state), losses


@pytest.fixture(scope="module")
def on_one_device():
    return {
        recipe.stage: _run(recipe, meshes.make_mesh(devices=jax.devices()[:1]), "dp", 3)
        for recipe in (BASE, SUPER_RESOLUTION)
    }


def test_eight_devices_give_the_loss_of_one(on_one_device):
    state, losses = _run(BASE, meshes.make_mesh(2, 2, 2), "fsdp_tp", 3)
    want_state, want = on_one_device["base"]
    np.testing.assert_allclose(losses[:1], want[:1], rtol=1e-6)
    np.testing.assert_allclose(losses, want, rtol=1e-4)
    assert jax.tree.structure(state) == jax.tree.structure(want_state)


def test_state_is_float32_and_ema_follows(on_one_device):
    state, _ = on_one_device["base"]
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves((state.params, state.ema)))
    assert set(state.params) == {"unet", "text_encoder"}
    assert set(on_one_device["super-resolution"][0].params) == {"unet"}
    moved = jax.tree.map(lambda e, p: np.abs(e - p).max(), state.ema["0.99"], state.params)
    assert 0 < max(jax.tree.leaves(moved)) < 0.1


def test_the_text_encoder_learns_with_the_base_stage():
    """Zero-initialised branches hide the text at first; after a step its encoder must get a gradient."""
    networks = _networks(BASE)
    params = {"unet": tiny.random_params(tiny.one_level(tiny.BASE)), "text_encoder": tiny.random_params(tiny.TEXT)}
    loss = objective.make_loss(networks, BASE)
    grads, _ = jax.jit(jax.grad(loss, has_aux=True))(params, {}, _batch(BASE), jax.random.key(0))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert min(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(grads["text_encoder"])) > 0


def test_crops_of_both_pictures_come_from_one_place():
    full = jnp.arange(32 * 32, dtype=jnp.float32).reshape(1, 32, 32, 1).repeat(5, 0)
    high, low = objective._random_crop(jax.random.key(3), (full, full + 0.5), 16, 4)
    np.testing.assert_array_equal(low - high, 0.5)
    corners = np.asarray(high[:, 0, 0, 0]).astype(int)
    assert len(set(corners)) > 1
    assert all(corner // 32 % 4 == 0 and corner % 32 % 4 == 0 for corner in corners)


def test_golden_first_losses(on_one_device):
    """If you did not mean to change what is trained, this is the alarm; if you did, put the new numbers here."""
    np.testing.assert_allclose(on_one_device["base"][1], GOLDEN["base"], rtol=2e-4)
    np.testing.assert_allclose(on_one_device["super-resolution"][1], GOLDEN["super-resolution"], rtol=2e-4)


GOLDEN = {"base": [0.942134, 1.088762, 0.960943], "super-resolution": [0.998665, 1.032556, 0.965593]}


def test_weight_decay_spares_vectors():
    tx = optimizer.make_optimizer(OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5), 10)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert float(updates["bias"].max()) == 0 and float(updates["kernel"].max()) < 0


def test_schedule_warms_up_and_ends():
    schedule = optimizer.learning_rate_schedule(
        OptimizerConfig(learning_rate=1e-3, final_learning_rate=1e-5, warmup_steps=10), 100
    )
    assert float(schedule(0)) == 0
    np.testing.assert_allclose([schedule(10), schedule(100)], [1e-3, 1e-5], rtol=1e-5)
