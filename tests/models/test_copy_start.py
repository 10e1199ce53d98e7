"""A super-resolution net that starts as a copy of its low-resolution input."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from if_jax.config import to_recipe
from if_jax.models import presets
from if_jax.models.copy_start import start_by_copying
from if_jax.models.unet import UNet, UNetConfig
from if_jax.training import objective


def outputs(config: UNetConfig, params: dict, low: jax.Array, t: int) -> jax.Array:
    rows = len(low)
    x_t = jax.random.normal(jax.random.key(1), low.shape)
    text = jax.random.normal(jax.random.key(2), (rows, 5, config.encoder_hid_dim))
    steps = jnp.full((rows,), t)
    return UNet(config).apply({"params": params}, jnp.concatenate([x_t, low], -1), steps, text, steps)  # type: ignore


@pytest.mark.parametrize("groups", [4, 3])
def test_it_begins_with_the_low_resolution_picture_and_every_weight_learns(groups: int) -> None:
    config = dataclasses.replace(
        tiny.SUPER_RESOLUTION,
        block_out_channels=(24, 48),
        norm_num_groups=groups,
        attention_levels=(False, True),
        cross_attention_dim=32,
    )
    low = jnp.clip(jax.random.normal(jax.random.key(0), (2, 8, 8, 3)) * 0.5, -1, 1)
    shapes = (low.shape[:3] + (6,), (2,), (2, 5, config.encoder_hid_dim), (2,))
    dummy = [jnp.zeros(shape, jnp.int32 if len(shape) == 1 else jnp.float32) for shape in shapes]
    random = nn.meta.unbox(UNet(config).init(jax.random.key(3), *dummy)["params"])
    params = start_by_copying(random, config)
    assert jax.tree.structure(params) == jax.tree.structure(random)
    for t in (3, 900):
        out = outputs(config, params, low, t)
        np.testing.assert_allclose(out[..., :3], low, atol=0.02)
        assert not np.any(out[..., 3:])

    def loss(params: dict) -> jax.Array:
        return jnp.mean((outputs(config, params, low, 500)[..., :3] - 0.5) ** 2)

    gradient = jax.grad(loss)(params)
    last = gradient["up_blocks_1"]["resnets_1"]
    for name in ("conv2", "conv_shortcut"):
        assert float(jnp.abs(last[name]["kernel"]).max()) > 1e-6, name


def test_what_cannot_start_so_is_refused() -> None:
    with pytest.raises(ValueError, match="a base stage has no low-resolution input"):
        start_by_copying({}, tiny.BASE)
    with pytest.raises(ValueError, match="a copy needs three groups of four channels"):
        start_by_copying({}, tiny.SUPER_RESOLUTION)
    keys = {"stage": "super-resolution", "unet": "demo-II", "text_encoder_from": "x", "data": {"size": 256}}
    with pytest.raises(ValueError, match="only a super-resolution net that predicts x0"):
        to_recipe(keys | {"init_copy": True})
    with pytest.raises(ValueError, match="init_copy is set with init_from 'y': choose one"):
        to_recipe(keys | {"init_copy": True, "prediction": "x0", "init_from": "y"})


def test_the_recipe_key_makes_such_weights() -> None:
    keys = {"stage": "super-resolution", "unet": "demo-II", "text_encoder_from": "x", "prediction": "x0"}
    recipe = to_recipe(keys | {"init_copy": True, "data": {"size": 256, "crop": 64}})
    networks = objective.make_networks(recipe, presets.T5_ENCODERS["demo"])
    make = lambda key: objective.init_params(networks, recipe, key)  # noqa: E731
    params = nn.meta.unbox(jax.eval_shape(make, jax.random.key(0)))["unet"]
    boxed = jax.eval_shape(make, jax.random.key(0))["unet"]["conv_in"]["kernel"]
    assert params["conv_in"]["kernel"].shape == (3, 3, 6, 16) and isinstance(boxed, nn.LogicallyPartitioned)
