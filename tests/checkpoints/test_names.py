"""Names and layouts of weights, and configurations, go to torch and back without loss, and misfits are named."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from if_jax.checkpoints.names import (
    lazy_from_torch,
    t5_config_from_hf,
    t5_config_to_hf,
    to_torch,
    unet_config_from_diffusers,
    unet_config_to_diffusers,
)
from if_jax.checkpoints.tensors import Lazy
from if_jax.checkpoints.weights import load_params
from if_jax.models.presets import SCALE, T5_ENCODERS, UNETS
from if_jax.models.t5 import T5Config, T5Encoder
from if_jax.models.unet import UNet, UNetConfig

UNET = UNetConfig(4, (8, 16), (1, 1), (False, True), 32, 6, 6, 6, 8, 2, 12, 4, aug_level_embedding=True)
T5 = T5Config(vocab_size=20, d_model=12, d_kv=4, d_ff=10, num_layers=2, num_heads=3)

# What the published configuration of IF-II-L holds, written before later diffusers added keys.
PUBLISHED_II_L = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.16.0.dev0",
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 64,
    "attention_head_dim": 64,
    "block_out_channels": [160, 320, 640, 960, 1280],
    "center_input_sample": False,
    "class_embed_type": "timestep",
    "cross_attention_dim": 1280,
    "cross_attention_norm": "group_norm",
    "down_block_types": ["ResnetDownsampleBlock2D"] * 3 + ["SimpleCrossAttnDownBlock2D"] * 2,
    "encoder_hid_dim": 4096,
    "in_channels": 6,
    "layers_per_block": [2, 2, 3, 5, 5],
    "mid_block_scale_factor": SCALE,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "only_cross_attention": False,
    "out_channels": 6,
    "resnet_out_scale_factor": SCALE,
    "resnet_skip_time_act": True,
    "resnet_time_scale_shift": "scale_shift",
    "sample_size": 256,
    "time_embedding_act_fn": "gelu",
    "time_embedding_dim": 1280,
    "up_block_types": ["SimpleCrossAttnUpBlock2D"] * 2 + ["ResnetUpsampleBlock2D"] * 3,
}


@cache
def abstract(kind: str) -> dict[str, Any]:
    key, length = jax.random.key(0), np.zeros((1, 3), np.int32)
    if kind == "t5":
        boxed = jax.eval_shape(T5Encoder(T5).init, key, length, length)
    else:
        x_t, step, text = np.zeros((1, 4, 4, 6)), np.zeros(1, np.int32), np.zeros((1, 3, 6))
        boxed = jax.eval_shape(UNet(UNET).init, key, x_t, step, text, step)
    return nn.meta.unbox(boxed)["params"]


def random_params(kind: str) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), abstract(kind))


def torch_shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the other libraries give to the same network."""
    torch = pytest.importorskip("torch")

    with torch.device("meta"):
        if kind == "t5":
            from transformers import T5Config as HFConfig
            from transformers import T5EncoderModel

            net = T5EncoderModel(HFConfig(**t5_config_to_hf(T5)))
        else:
            from diffusers import UNet2DConditionModel

            net = UNet2DConditionModel.from_config(unet_config_to_diffusers(UNET))
    return {name: tuple(tensor.shape) for name, tensor in net.named_parameters()}


@pytest.mark.parametrize("kind", ["unet", "t5"])
def test_names_and_shapes_are_those_of_the_other_library(kind: str) -> None:
    ours = {name: array.shape for name, array in to_torch(random_params(kind), kind)}
    assert ours == torch_shapes(kind)


@pytest.mark.parametrize("kind", ["unet", "t5"])
def test_weights_survive_the_round_trip(kind: str) -> None:
    params = random_params(kind)
    tensors = dict(to_torch(params, kind))
    assert all(array.flags.c_contiguous for array in tensors.values())  # safetensors writes raw memory
    jax.tree.map(np.testing.assert_array_equal, load_params(lazy_from_torch(tensors, abstract(kind), kind)), params)


def test_weights_are_cast_to_the_wanted_type() -> None:
    tensors = {name: array.astype(np.float16) for name, array in to_torch(random_params("t5"), "t5")}
    params = load_params(lazy_from_torch(tensors, abstract("t5"), "t5"))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}


def unread(name: str, array: np.ndarray) -> Lazy:
    def read() -> np.ndarray:
        raise AssertionError(f"{name} was read")

    return Lazy(array.shape, array.dtype, read)


def test_every_tensor_is_read_exactly_once() -> None:
    tensors, read = dict(to_torch(random_params("unet"), "unet")), []

    def lazy(name: str) -> Lazy:
        return Lazy(tensors[name].shape, tensors[name].dtype, lambda: [read.append(name), tensors[name]][1])

    opened = lazy_from_torch({name: lazy(name) for name in tensors}, abstract("unet"), "unet")
    assert not read
    for name, array in to_torch(opened, "unet"):
        np.testing.assert_array_equal(array, tensors[name])
    assert sorted(read) == sorted(tensors)


def test_misfits_are_named_before_anything_is_read() -> None:
    tensors = {name: unread(name, array) for name, array in to_torch(random_params("unet"), "unet")}
    tensors["mid_block.resnets.2.conv1.weight"] = tensors["conv_in.bias"]
    del tensors["up_blocks.1.resnets.0.norm1.weight"]
    with pytest.raises(ValueError) as error:
        lazy_from_torch(tensors, abstract("unet"), "unet")
    message = str(error.value)
    assert "missing up_blocks.1.resnets.0.norm1.weight;" in message
    assert message.endswith("unexpected mid_block.resnets.2.conv1.weight")


def test_a_wrong_shape_is_named_in_torch_order() -> None:
    tensors = dict(to_torch(random_params("unet"), "unet"))
    tensors["conv_in.weight"] = np.zeros((8, 3, 3, 3), np.float32)
    with pytest.raises(ValueError, match=r"conv_in.weight has shape \(8, 3, 3, 3\); .* \(8, 6, 3, 3\)"):
        lazy_from_torch(tensors, abstract("unet"), "unet")


def test_the_token_table_may_come_under_either_name_or_both() -> None:
    tensors = dict(to_torch(random_params("t5"), "t5"))
    tied = {**tensors, "encoder.embed_tokens.weight": tensors["shared.weight"]}
    only_alias = {name: array for name, array in tied.items() if name != "shared.weight"}
    for named in (tensors, tied, only_alias):
        params = load_params(lazy_from_torch(named, abstract("t5"), "t5"))
        np.testing.assert_array_equal(params["shared"]["embedding"], tensors["shared.weight"])


def test_diffusers_reads_the_whole_configuration() -> None:
    pytest.importorskip("torch")
    UNet2DConditionModel = pytest.importorskip("diffusers").UNet2DConditionModel  # a class

    values = unet_config_to_diffusers(UNETS["demo-II"])
    assert json.loads(json.dumps(values)) == values
    net, unused = UNet2DConditionModel.from_config(values, return_unused_kwargs=True)
    assert set(unused) <= {"_class_name"}
    theirs = {name: value for name, value in net.config.items() if not name.startswith("_")}
    assert theirs == {name: value for name, value in values.items() if not name.startswith("_")}
    assert unet_config_from_diffusers(dict(net.config)) == UNETS["demo-II"]


def test_a_published_configuration_is_read() -> None:
    assert unet_config_from_diffusers(PUBLISHED_II_L) == UNETS["IF-II-L"]
    equal_levels = {**PUBLISHED_II_L, "layers_per_block": 3, "attention_head_dim": [64] * 5, "sample_size": [256, 256]}
    assert unet_config_from_diffusers(equal_levels).layers_per_block == (3,) * 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "silu"}, "act_fn='silu' .must be 'gelu'"),
        ({"resnet_time_scale_shift": None}, "resnet_time_scale_shift=None"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block_type='UNetMidBlock2DCrossAttn'"),
        ({"encoder_hid_dim_type": "image_proj"}, "encoder_hid_dim_type='image_proj'"),
        ({"class_embed_type": "projection"}, "class_embed_type='projection'"),
        ({"down_block_types": ["DownBlock2D"] * 5}, "down_block_types="),
        ({"up_block_types": ["ResnetUpsampleBlock2D"] * 5}, "up_block_types=.*mirror"),
        ({"mid_block_only_cross_attention": True}, "mid_block_only_cross_attention"),
        ({"attention_head_dim": [64, 64, 64, 64, 32]}, "attention_head_dim=.*must be the same everywhere"),
        ({"new_switch": True}, "new_switch=True .unknown"),
        ({"encoder_hid_dim": None}, "lacks encoder_hid_dim"),
    ],
)
def test_what_the_unet_cannot_express_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unet_config_from_diffusers({**PUBLISHED_II_L, **change})


def test_a_missing_key_takes_the_default_of_diffusers() -> None:
    """Whose default activation is not IF's: silence means SiLU, which is refused."""
    values = {name: value for name, value in PUBLISHED_II_L.items() if name != "act_fn"}
    with pytest.raises(ValueError, match="act_fn='silu'"):
        unet_config_from_diffusers(values)


@pytest.mark.parametrize("name", T5_ENCODERS)
def test_t5_configurations_survive_the_round_trip(name: str) -> None:
    from transformers import T5Config as HFConfig

    theirs = HFConfig(**t5_config_to_hf(T5_ENCODERS[name]))
    assert theirs.is_gated_act and theirs.dense_act_fn == "gelu_new"
    assert t5_config_from_hf(theirs.to_dict()) == T5_ENCODERS[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feed_forward_proj": "relu"}, "feed_forward_proj='relu'"),
        ({"model_type": "umt5"}, "model_type='umt5'"),
    ],
)
def test_other_text_encoders_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        t5_config_from_hf({**t5_config_to_hf(T5), **change})
    with pytest.raises(ValueError, match="lacks d_kv"):
        t5_config_from_hf({name: value for name, value in t5_config_to_hf(T5).items() if name != "d_kv"})
