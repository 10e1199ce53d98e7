"""Frozen kernels in int8: how they are rounded, and that layers compute what the rounded kernels say."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from if_jax.checkpoints.weights import abstract_params, boxed_params, load_params
from if_jax.models import int8, lora
from if_jax.models.layers import Conv, Dense
from if_jax.parallel import rules


class TwoLayers(nn.Module):
    """A convolution and a linear layer without bias."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return Dense(5, use_bias=False, name="dense")(nn.remat(Conv)(6, name="first")(x))


@pytest.fixture(scope="module")
def params() -> dict:
    made = TwoLayers().init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))["params"]
    made = jax.tree.map(lambda leaf: np.array(leaf), nn.unbox(made))
    made["first"]["bias"] = np.linspace(-1, 1, 6, dtype=np.float32)
    return made


def rounded(params: dict) -> dict:
    return {
        layer: {name: int8.quantise(value) if name == "kernel" else value for name, value in own.items()}
        for layer, own in params.items()
    }


def test_rounding_is_within_half_a_step_of_each_channel() -> None:
    kernel = np.random.default_rng(0).normal(size=(3, 3, 4, 5)).astype(np.float32) * np.array(
        [1e-3, 1, 0, 5, 1e4], np.float32
    )
    made = int8.quantise(kernel)
    largest = np.abs(kernel).max(axis=(0, 1, 2))
    assert (
        made.values.dtype == np.int8
        and np.abs(made.values[..., [0, 1, 3, 4]]).max(axis=(0, 1, 2)).tolist() == [127] * 4
    )
    assert np.all(np.abs(np.asarray(made.astype(jnp.float32)) - kernel) <= largest / 254 * 1.0001)


def test_layers_and_their_gradients_are_those_of_the_rounded_kernels(params: dict) -> None:
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 3))
    in_int8 = rounded(params)
    in_float = int8.to_float(in_int8, jnp.float32)
    run = partial(lora.apply, TwoLayers())
    loss = lambda params, x: jnp.sum(run(params, x) ** 3)  # noqa: E731
    np.testing.assert_allclose(run(in_int8, x), run(in_float, x), rtol=1e-5, atol=1e-5)
    gradients = [jax.grad(loss, argnums=1)(each, x) for each in (in_int8, in_float)]
    np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-4)
    assert np.abs(run(in_int8, x) - run(params, x)).max() > 1e-4  # they are rounded


def test_factors_beside_int8_kernels_count_as_merged_ones(params: dict) -> None:
    boxed = {
        "first": {"kernel": nn.LogicallyPartitioned(params["first"]["kernel"], (None, None, "in", "out"))},
        "dense": {"kernel": nn.LogicallyPartitioned(params["dense"]["kernel"], ("in", "out"))},
    }
    factors = nn.unbox(lora.init_factors(boxed, "dense+first", 2, jax.random.key(2)))
    factors = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(3), leaf.shape), factors)
    adapted = lora.AdaptedParams(rounded(params), factors, 0.5)
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 3))
    merged = lora.merge(adapted)
    assert not int8.split(merged)[1]
    np.testing.assert_allclose(
        lora.apply(TwoLayers(), adapted, x), lora.apply(TwoLayers(), merged, x), rtol=1e-5, atol=1e-5
    )


def test_kernels_are_rounded_as_they_are_placed() -> None:
    """On eight devices under fsdp_tp, each kernel and its scale split along the same channels."""
    config = tiny.one_level(tiny.BASE)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    boxed = boxed_params(config)
    structs = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.unbox(boxed),
        rules.state_shardings(boxed, mesh, rules.PRESETS["fsdp_tp"]),
    )
    abstract = int8.abstract_kernels(structs)
    random = tiny.random_params(config, seed=1)
    placed = load_params(random, "float32", jax.tree.map(lambda leaf: leaf.sharding, abstract))
    jax.tree.map(lambda leaf, own: leaf.sharding == own.sharding or pytest.fail("moved"), abstract, placed)
    kernels = lora.kernels_of(jax.tree.map(np.asarray, random))
    assert jax.tree.structure(abstract_params(config)) == jax.tree.structure(random)
    for path, kernel in lora.kernels_of(placed).items():
        np.testing.assert_array_equal(kernel.values, int8.quantise(kernels[path]).values, err_msg="/".join(path))
