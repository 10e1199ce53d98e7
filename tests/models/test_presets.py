"""Sizes of the zoo, without allocating any of it."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from if_jax.checkpoints.names import unet_config_from_diffusers, unet_config_to_diffusers
from if_jax.models.presets import SCALE, T5_ENCODERS, UNETS
from if_jax.models.t5 import T5Encoder
from if_jax.models.unet import UNet

UNET_PARAMETERS = {
    "IF-I-M": 371_605_830,
    "IF-I-L": 935_365_830,
    "IF-I-XL": 4_304_695_110,
    "IF-II-M": 535_441_926,
    "IF-II-L": 1_243_277_190,
    "IF-III-L": 693_523_718,
}


def count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", UNET_PARAMETERS)
def test_unets_have_the_parameters_of_the_published_ones(name: str) -> None:
    config = UNETS[name]
    batch = (jnp.zeros((1, 64, 64, config.in_channels)), jnp.zeros(1, int), jnp.zeros((1, 77, 4096)))
    aug_level = jnp.zeros(1, int) if config.aug_level_embedding else None
    assert count(jax.eval_shape(UNet(config).init, jax.random.key(0), *batch, aug_level)) == UNET_PARAMETERS[name]


@pytest.mark.parametrize(("name", "parameters"), [("t5-v1_1-xxl", 4_762_310_656), ("t5-v1_1-small", 35_332_800)])
def test_t5_encoders_have_the_parameters_of_the_published_ones(name: str, parameters: int) -> None:
    ids = jnp.zeros((1, 77), int)
    assert count(jax.eval_shape(T5Encoder(T5_ENCODERS[name]).init, jax.random.key(0), ids, ids)) == parameters


@pytest.mark.parametrize("name", UNETS)
def test_every_preset_can_be_released(name: str) -> None:
    assert unet_config_from_diffusers(unet_config_to_diffusers(UNETS[name])) == UNETS[name]


def test_the_demo_stages_fit_their_text_encoder() -> None:
    width = T5_ENCODERS["demo"].d_model
    assert UNETS["demo-I"].encoder_hid_dim == UNETS["demo-II"].encoder_hid_dim == width
    assert [UNETS[f"demo-{name}"].sample_size for name in ("I", "II", "III")] == [64, 256, 1024]


def test_residual_sums_are_scaled_as_published() -> None:
    """Not by the square root of two: the difference of 1e-5 per block compounds."""
    assert UNETS["IF-II-L"].resnet_out_scale_factor == UNETS["IF-II-L"].mid_block_scale_factor == SCALE
    assert pytest.approx(1.4142271248762552, rel=1e-15) == SCALE
