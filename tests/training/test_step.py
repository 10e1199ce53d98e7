"""The training step: what it optimises, that it does not depend on the devices, and how a batch is accumulated.

The programs are those of training (`setup.lower_step`), for a net of one level. Each is compiled once, with an
optimizer that is plain SGD or the recipe's AdamW by a flag in its state, and keeps the gradient it was given.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import linen as nn
from jax.sharding import Mesh

from if_jax.config import DataConfig, MeshConfig, OptimizerConfig, Recipe
from if_jax.models.t5 import T5Encoder
from if_jax.models.unet import UNet
from if_jax.parallel import mesh as meshes
from if_jax.parallel import rules
from if_jax.training import objective, optimizer, randomness, setup
from if_jax.training.step import TrainState, init_state, make_step

TEXT_LENGTH = 9
BASE = Recipe(
    batch_size=8,
    text_length=TEXT_LENGTH,
    ema_decays=(0.99,),
    data=DataConfig(size=8),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
)
SUPER_RESOLUTION = dataclasses.replace(
    BASE,
    stage="super-resolution",
    text_encoder_from="x",
    batch_size=16,
    pooled_dropout=0.4,
    data=DataConfig(size=32, low_size=8, low_blur=0.6, crop=16),
)
RECIPES = {"base": BASE, "super-resolution": SUPER_RESOLUTION}
NETS = {"base": tiny.one_level(tiny.BASE), "super-resolution": tiny.one_level(tiny.SUPER_RESOLUTION)}
MESHES = {"one": (1, 1, 1), "dp": (8, 1, 1), "fsdp": (2, 4, 1), "fsdp_tp": (2, 2, 2)}
CASES = [("base", "fsdp_tp")]
# fsdp_tp shards over the axes of dp and fsdp, and tensor too; the runs of test_loop.py are dp.
SLOW = [("base", "dp"), ("base", "fsdp"), ("super-resolution", "fsdp_tp")]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]
STEPS, SGD_RATE = 10, 1.0
# Zero but for rounding: softmax does not see what is added to all keys alike, nor a norm of one channel per group what
# is added to a channel.
NO_GRADIENT = {"['unet']['add_embedding']['pool']['k_proj']['bias']", "['unet']['encoder_hid_proj']['bias']"}
# Less optimisation of machine code: half the time to compile, the same partitioning.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def _networks(stage: str) -> objective.Networks:
    return objective.Networks(UNet(NETS[stage]), T5Encoder(tiny.TEXT))


def _mesh(name: str) -> tuple[Mesh, rules.Rules]:
    sizes = MESHES[name]
    devices = jax.devices()[: int(np.prod(sizes))]
    return meshes.make_mesh(*sizes, devices=devices), rules.PRESETS["dp" if name == "one" else name]


def _batch(recipe: Recipe, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    side = recipe.data.size
    ids = rng.integers(3, 259, (recipe.batch_size, TEXT_LENGTH), dtype=np.int32)
    image = rng.integers(0, 256, (recipe.batch_size, side, side, 3), dtype=np.uint8)
    return {"image": image, "ids": ids, "mask": np.ones_like(ids)}


def _sgd_or_adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    adamw = optimizer.make_optimizer(config, 100)

    def init(params: Any) -> dict:
        empty = jax.tree.map(jnp.zeros_like, params)
        return {"use_adamw": jnp.zeros((), bool), "gradient": empty, "adamw": adamw.init(params)}

    def update(grads: Any, state: dict, params: Any) -> tuple[Any, dict]:
        updates, adamw_state = adamw.update(grads, state["adamw"], params)
        updates = jax.tree.map(lambda a, g: jnp.where(state["use_adamw"], a, -SGD_RATE * g), updates, grads)
        return updates, {"use_adamw": state["use_adamw"], "gradient": grads, "adamw": adamw_state}

    return optax.GradientTransformation(init, update)


def _setup(stage: str, mesh_name: str, accumulate: int = 1) -> setup.TrainingSetup:
    mesh, sharding_rules = _mesh(mesh_name)
    recipe = dataclasses.replace(RECIPES[stage], mesh=MeshConfig(rules="dp" if mesh_name == "one" else mesh_name))
    recipe = dataclasses.replace(recipe, accumulate=accumulate)
    return setup.TrainingSetup(recipe, _networks(stage), _sgd_or_adamw(recipe.optimizer), mesh, sharding_rules)


@functools.cache
def _program(stage: str, mesh_name: str, accumulate: int = 1) -> tuple[Any, TrainState]:
    """The compiled step and its abstract state, which holds the places."""
    parts = _setup(stage, mesh_name, accumulate)
    with jax.set_mesh(parts.mesh):
        abstract = setup.abstract_state(parts)
        frozen = jax.device_put(_frozen(stage), rules.replicated(parts.mesh))
        return setup.lower_step(parts, abstract, frozen).compile(QUICK), abstract


def _frozen(stage: str) -> dict:
    return {} if stage == "base" else {"text_encoder": tiny.random_params(tiny.TEXT)}


@functools.cache
def _random_params(stage: str) -> dict:
    """None is zero, so that every weight has a gradient at the first step."""
    text = {"text_encoder": tiny.random_params(tiny.TEXT)} if stage == "base" else {}
    return {"unet": tiny.random_params(NETS[stage])} | text


@functools.cache
def _fresh_params(stage: str) -> dict:
    """A run's own first weights, made in place on a mesh of eight."""
    recipe, networks, (mesh, sharding_rules) = RECIPES[stage], _networks(stage), _mesh("fsdp_tp")
    init = functools.partial(objective.init_params, networks, recipe)
    places = rules.state_shardings(jax.eval_shape(init, jax.random.key(0)), mesh, sharding_rules)
    with jax.set_mesh(mesh):
        make = jax.jit(lambda key: nn.meta.unbox(init(key)), out_shardings=places, compiler_options=QUICK)
        return jax.device_get(make(jax.random.key(0)))


@functools.cache
def _trained(
    stage: str, mesh_name: str, optimizer_name: str, accumulate: int = 1
) -> tuple[list[float], dict, TrainState]:
    """Losses of ten steps, the first gradient and the last state: "sgd" from random, "adamw" from fresh weights."""
    recipe, (mesh, sharding_rules) = RECIPES[stage], _mesh(mesh_name)
    step, abstract = _program(stage, mesh_name, accumulate)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    params = _random_params(stage) if optimizer_name == "sgd" else _fresh_params(stage)
    state = init_state(jax.tree.map(jnp.asarray, params), _sgd_or_adamw(recipe.optimizer), recipe.ema_decays)
    state.opt_state["use_adamw"] = jnp.array(optimizer_name == "adamw")
    state = jax.device_put(state, places)
    frozen, split = jax.device_put(_frozen(stage), rules.replicated(mesh)), rules.batch_sharding(mesh, sharding_rules)
    losses, first = [], None
    with jax.set_mesh(mesh):
        for k in range(STEPS):
            state, metrics = step(state, frozen, jax.device_put(_batch(recipe, k), split))
            losses.append(float(metrics["loss"]))
            first = first or jax.device_get(state.opt_state["gradient"])
            same = jax.tree.map(lambda leaf, place: leaf.sharding.is_equivalent_to(place, leaf.ndim), state, places)
            assert all(jax.tree.leaves(same)), f"step {k + 1} moved the state"
    return losses, first, jax.device_get(state)


def _named(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf, np.float64) for path, leaf in leaves}


@pytest.mark.parametrize(("stage", "mesh_name"), CASES)
def test_eight_devices_give_the_loss_and_gradient_of_one(stage, mesh_name):
    _check_first_step(stage, mesh_name, 1)


@pytest.mark.parametrize(
    ("mesh_name", "parts"),
    [
        ("one", 4),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("one", 2), ("fsdp_tp", 2), ("fsdp_tp", 4)]),
    ],
)
def test_a_batch_in_parts_gives_the_loss_and_gradient_of_the_whole(mesh_name, parts):
    """All that is drawn at random is drawn in this stage: timesteps, noise, crops, levels, blur, pooled dropout."""
    _check_first_step("super-resolution", mesh_name, parts)


def _check_first_step(stage, mesh_name, parts):
    losses, gradient, _ = _trained(stage, mesh_name, "sgd", parts)
    want_losses, want, _ = _trained(stage, "one", "sgd")
    assert abs(losses[0] / want_losses[0] - 1) <= 1e-6
    gradient, want = _named(gradient), _named(want)
    for part in ("", "['unet']", *(["['text_encoder']"] if stage == "base" else [])):  # the encoder trains as well
        names = [name for name in want if name.startswith(part)]
        error = sum(np.sum((gradient[name] - want[name]) ** 2) for name in names) ** 0.5
        assert error <= 1e-5 * sum(np.sum(want[name] ** 2) for name in names) ** 0.5, part


@pytest.mark.parametrize(("stage", "mesh_name"), CASES)
def test_ten_sgd_steps_lead_eight_devices_to_the_weights_of_one(stage, mesh_name):
    got, want = (_named(_trained(stage, name, "sgd")[2].params) for name in (mesh_name, "one"))
    start = _named(_random_params(stage))
    for name in want:
        if name not in NO_GRADIENT:
            assert np.linalg.norm(got[name] - want[name]) <= 1e-5 * np.linalg.norm(want[name]), name
            assert np.linalg.norm(want[name] - start[name]) > 0, name


@pytest.mark.parametrize(("stage", "mesh_name"), CASES)
def test_ten_adamw_steps_give_eight_devices_the_losses_of_one(stage, mesh_name):
    losses, want = (_trained(stage, name, "adamw")[0] for name in (mesh_name, "one"))
    np.testing.assert_allclose(losses[:1], want[:1], rtol=1e-6)
    np.testing.assert_allclose(losses, want, rtol=1e-4)


def test_a_preset_splits_what_it_says():
    """The cases above would pass on replicated weights too."""
    kernel = "['unet']['mid_block']['resnets_0']['conv1']['kernel']"
    for mesh_name, ways in (("dp", 1), ("fsdp", 4), ("fsdp_tp", 4)):
        abstract = setup.abstract_state(_setup("base", mesh_name))
        for tree in (abstract.params, abstract.ema["0.99"], abstract.opt_state["adamw"][1][0].mu):
            leaf = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}[
                kernel
            ]
            assert leaf.size == ways * np.prod(leaf.sharding.shard_shape(leaf.shape)), mesh_name


def test_state_is_float32_and_ema_follows():
    _, _, state = _trained("base", "one", "adamw")
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves((state.params, state.ema)))
    assert set(state.params) == {"unet", "text_encoder"}
    assert set(_trained("super-resolution", "one", "adamw")[2].params) == {"unet"}
    assert int(state.step) == int(state.guard.accepted) == STEPS
    moved = jax.tree.map(lambda e, p: np.abs(e - p).max(), state.ema["0.99"], state.params)
    assert 0 < max(jax.tree.leaves(moved)) < 0.3


def test_the_text_encoder_learns_with_the_base_stage():
    _, gradient, _ = _trained("base", "one", "sgd")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert min(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradient["text_encoder"])) > 0


def test_golden_first_losses():
    """If you did not mean to change what is trained, this is the alarm; if you did, put the new numbers here."""
    for stage, want in GOLDEN.items():
        np.testing.assert_allclose(_trained(stage, "one", "adamw")[0][:3], want, rtol=2e-4)


GOLDEN = {"base": [1.212306, 1.077534, 0.920757], "super-resolution": [1.124324, 1.005224, 0.964930]}


def test_errors_by_timestep_add_up():
    """The four quarters of the chain share out the squared error, each timestep in its own."""
    t = np.array([0, 249, 250, 499, 500, 749, 750, 999])
    parts = objective.by_timestep(jnp.arange(8.0), jnp.asarray(t))
    np.testing.assert_array_equal(parts["count_by_t"], [2, 2, 2, 2])
    np.testing.assert_array_equal(parts["mse_sum_by_t"], [1, 5, 9, 13])


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_without_pooled_text_only_attention_reads_the_caption(share):
    """In a net whose attention hands nothing on, no gradient then reaches the text encoder."""
    recipe = dataclasses.replace(BASE, pooled_dropout=share)
    loss_fn, drawn = objective.make_loss(_networks("base"), recipe), randomness.draw(recipe, 8, jax.random.key(0))
    grad_fn = jax.jit(jax.grad(loss_fn, has_aux=True), compiler_options=QUICK)
    params = _random_params("base")
    deaf = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 0 if "to_out_0" in jax.tree_util.keystr(path) else leaf, params
    )

    def reached(params: Any) -> bool:
        grads, _ = grad_fn(params, {}, _batch(BASE), drawn)
        return any(leaf.any() for leaf in jax.tree.leaves(grads["text_encoder"]))

    assert reached(params)
    assert reached(deaf) == (share == 0.0)


def test_crops_of_both_pictures_come_from_one_place():
    full = jnp.arange(32 * 32, dtype=jnp.float32).reshape(1, 32, 32, 1).repeat(5, 0)
    corners = randomness.draw(SUPER_RESOLUTION, 5, jax.random.key(3))["corner"]
    high, low = objective._crop((full, full + 0.5), corners * 4, 16)
    np.testing.assert_array_equal(low - high, 0.5)
    first = np.asarray(high[:, 0, 0, 0]).astype(int)
    assert len(set(first)) > 1
    assert all(pixel // 32 % 4 == 0 and pixel % 32 % 4 == 0 for pixel in first)


def _quadratic(params: Any, frozen: Any, batch: Any, drawn: Any) -> tuple[jax.Array, dict]:
    error = batch["x"] @ params["kernel"] + params["bias"] - batch["y"]
    loss = jnp.mean(error**2)
    return loss, {"loss": loss, "largest_row": batch["x"][:, 0].mean()}


def _regression(rows: int) -> tuple[dict, dict]:
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return {"kernel": draw(6, 4), "bias": draw(4)}, {"x": draw(rows, 6), "y": draw(rows, 4)}


@pytest.mark.parametrize("on_mesh", [False, True])
def test_a_batch_in_four_parts_makes_the_same_update(on_mesh):
    params, batch = _regression(32)
    params = jax.tree.map(jnp.asarray, params)
    tx = optax.adamw(1e-2)
    mesh, sharding_rules = _mesh("fsdp" if on_mesh else "one")
    split = rules.batch_sharding(mesh, sharding_rules)
    state = init_state(params, tx, (0.9,))
    seen = []

    def shard(part: Any) -> Any:
        seen.extend(rows.shape for rows in part.values())
        return jax.lax.with_sharding_constraint(part, split)

    results = []
    with jax.set_mesh(mesh):
        batch, state = jax.device_put(batch, split), jax.device_put(state, rules.replicated(mesh))
        for parts in (1, 4):
            step = jax.jit(make_step(_quadratic, tx, (0.9,), 0, accumulate=parts, shard=shard))
            results.append(jax.device_get(step(state, {}, batch)))
    (whole, whole_metrics), (parted, parted_metrics) = results
    assert set(seen) == {(8, 6), (8, 4)}  # x and y
    for left, right in zip(*(jax.tree.leaves((s.params, s.ema, s.opt_state)) for s in (whole, parted)), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-6, atol=1e-7)
    assert whole_metrics.keys() == parted_metrics.keys()
    for name, value in whole_metrics.items():
        np.testing.assert_allclose(parted_metrics[name], value, rtol=1e-6, atol=1e-7, err_msg=name)


def test_every_part_and_step_has_its_own_noise():
    def noisy(params: Any, frozen: Any, batch: Any, drawn: Any) -> tuple[jax.Array, dict]:
        mean = drawn["eps"].mean()
        return params["w"] * mean, {"loss": params["w"] * mean, "squared": mean**2}

    state = init_state({"w": jnp.ones(())}, optax.sgd(1.0), ())
    draw = lambda key: {"eps": jax.random.normal(key, (8,))}  # noqa: E731
    step = jax.jit(make_step(noisy, optax.sgd(1.0), (), 0, accumulate=4, draw=draw))
    after, metrics = step(state, {}, {"x": np.zeros(8)})
    assert float(metrics["squared"]) - float(metrics["loss"]) ** 2 > 1e-3  # they are not one number four times
    _, again = step(state, {}, {"x": np.zeros(8)})
    assert float(again["loss"]) == float(metrics["loss"])
    _, later = step(dataclasses.replace(after, params=state.params), {}, {"x": np.zeros(8)})
    assert float(later["loss"]) != float(metrics["loss"])
