"""The layout of DeepFloyd's own release: its words for our configurations, and where its file keeps each tensor.

What the original code makes of a configuration is written here as it was observed. Where its package is installed
(`pip install --no-deps deepfloyd-if`; it pins an old torch), its own nets are built, filled and compared as well.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from if_jax.checkpoints import names
from if_jax.checkpoints.deepfloyd import TensorRow, join, split, table
from if_jax.checkpoints.deepfloyd_config import unet_config_from_deepfloyd, unet_config_to_deepfloyd
from if_jax.checkpoints.weights import abstract_params, load_params
from if_jax.models.presets import SCALE, UNETS
from if_jax.models.unet import UNet, UNetConfig

TEXT = {"cross_attention_dim": 32, "encoder_hid_dim": 48, "attention_head_dim": 16, "addition_embed_type_num_heads": 4}
EFFICIENT = {"time_embedding_act": True, "resnet_skip_time_act": True}
SCALED = {"resnet_out_scale_factor": SCALE, "mid_block_scale_factor": SCALE}
BASE = UNetConfig(8, (32, 64), (1, 2), (False, True), time_embedding_dim=64, **TEXT)
SUPER_RESOLUTION = UNetConfig(
    *(8, (32, 64), (2, 1), (True, False)),
    **{"in_channels": 6, "aug_level_embedding": True, "time_embedding_dim": 64, **EFFICIENT, **SCALED, **TEXT},
)
UNUSUAL = replace(
    BASE,
    sample_size=16,
    block_out_channels=(64, 192, 256),
    layers_per_block=(1, 3, 2),
    attention_levels=(True, False, True),
    attention_head_dim=32,
    time_embedding_dim=None,
)
CONFIGS = {
    "base": BASE,
    "super-resolution": SUPER_RESOLUTION,
    "unusual": UNUSUAL,
    "cross-only": replace(SUPER_RESOLUTION, only_cross_attention=True),
    "cross-only where two of three levels attend": replace(UNUSUAL, only_cross_attention=True),
    "middle attends alone": replace(BASE, attention_levels=(False, False), only_cross_attention=True),
    "one activation": replace(BASE, **EFFICIENT),
    "scaled sums": replace(BASE, **SCALED),
    "widths between multiples": replace(UNUSUAL, block_out_channels=(96, 160, 192), time_embedding_dim=192),
    "narrow in the middle": replace(UNUSUAL, block_out_channels=(64, 32, 128), time_embedding_dim=128),
}
# Names and shapes in the original's own state_dict, in its order, as SHA-256 of lines "name (shape)".
OBSERVED = {
    "base": (217, "975c25ccba70b4d12dce8dea141bb3f8938dcea7034fd8a71ea0f8abdc967017"),
    "super-resolution": (221, "fc0e2410e9c3cc81b21d1bb8f7aa10d613d9da2e22d08e1f0078d8e5fcc76f89"),
    "cross-only": (221, "d077a16517661bb3d2f33635011e1c625ead27c58fccd42c6cf17e02c4ee1ab2"),
}
PUBLISHED_I_XL = {
    "image_size": 64,
    "in_channels": 3,
    "model_channels": 704,
    "out_channels": 6,
    "num_res_blocks": 3,
    "attention_resolutions": "32,16,8",
    "channel_mult": "1,2,3,4",
    "num_heads": 1,
    "num_head_channels": 64,
    "num_heads_upsample": -1,
    "use_scale_shift_norm": True,
    "dropout": 0.0,
    "encoder_dim": 4096,
    "encoder_channels": 2816,
    "att_pool_heads": 64,
    "disable_self_attentions": False,
    "resblock_updown": True,
    "activation": "gelu",
    "precision": "16",
}
PARAMETERS = {
    "IF-I-M": 371_605_830,
    "IF-I-L": 935_365_830,
    "IF-I-XL": 4_304_695_110,
    "IF-II-M": 535_441_926,
    "IF-II-L": 1_243_277_190,
    "IF-III-L": 693_523_718,
}


def digest(shapes: list[tuple[str, tuple[int, ...]]]) -> tuple[int, str]:
    lines = [f"{name} {tuple(shape)}\n" for name, shape in shapes]
    return len(lines), hashlib.sha256("".join(lines).encode()).hexdigest()


def random_tensors(config: UNetConfig) -> dict[str, np.ndarray]:
    """Weights in the original's layout, of the size that training gives; none is zero, which would hide a branch."""
    rng, tensors = np.random.default_rng(0), {}
    for row in table(config):
        gain = len(row.shape) == 1 and row.name.endswith("weight")
        scale = 0.1 if len(row.shape) == 1 else math.prod(row.shape[1:]) ** -0.5
        tensors[row.name] = (rng.normal(size=row.shape) * scale + gain).astype(np.float32)
    return tensors


def to_diffusers(config: UNetConfig, tensors: dict[str, Any]) -> dict[str, np.ndarray]:
    return {part: value for row in table(config) for part, value in split(row, tensors[row.name]).items()}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_table_has_every_parameter_of_the_zoo(name: str) -> None:
    assert sum(math.prod(row.shape) for row in table(UNETS[name])) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["IF-I-M", "IF-II-L", "IF-III-L", "unusual", "cross-only", "middle attends alone"])
def test_the_parts_are_all_the_tensors_of_diffusers(name: str) -> None:
    config = {**UNETS, **CONFIGS}[name]
    parts = [(part, row.part_shape) for row in table(config) for part in row.parts]
    expected = {part: tensor.shape for part, tensor in names.lazy_torch(abstract_params(config), "unet").items()}
    assert len(parts) == len(expected)
    assert dict(parts) == expected


@pytest.mark.parametrize("name", OBSERVED)
def test_names_and_shapes_are_those_of_the_original(name: str) -> None:
    assert digest([(row.name, row.shape) for row in table(CONFIGS[name])]) == OBSERVED[name]


def test_blocks_are_numbered_as_in_the_original() -> None:
    base = {row.name: (row.shape, row.parts) for row in table(BASE)}
    sr = {row.name: (row.shape, row.parts) for row in table(SUPER_RESOLUTION)}
    # the last block of a level halves the size; the third output block doubles it, after its attention
    assert base["input_blocks.2.0.in_layers.2.bias"] == ((32,), ("down_blocks.0.downsamplers.0.conv1.bias",))
    assert base["input_blocks.3.0.skip_connection.weight"][1] == ("down_blocks.1.resnets.0.conv_shortcut.weight",)
    assert base["output_blocks.2.1.proj_out.weight"] == ((64, 64, 1), ("up_blocks.0.attentions.2.to_out.0.weight",))
    assert base["output_blocks.2.2.in_layers.2.weight"][1] == ("up_blocks.0.upsamplers.0.conv1.weight",)
    qkv = tuple(f"mid_block.attentions.0.to_{x}.weight" for x in "qkv")
    assert base["middle_block.1.qkv.weight"] == ((192, 64, 1), qkv)
    # where nothing attends, the block that doubles the size takes the place of attention
    assert sr["output_blocks.1.1.in_layers.2.weight"][1] == ("up_blocks.0.upsamplers.0.conv1.weight",)
    assert sr["aug_proj.2.weight"] == ((64, 64), ("class_embedding.linear_2.weight",))
    assert not any(name.startswith("aug_proj") for name in base)


def test_heads_are_interleaved() -> None:
    """Two heads of two rows: the first head's queries, keys and values come before the second's."""
    row = TensorRow("qkv.weight", (12, 1, 1), ("q", "k", "v"), head_dim=2)
    tensors = split(row, np.arange(12.0).reshape(12, 1, 1))
    assert {part: rows[:, 0].tolist() for part, rows in tensors.items()} == {
        "q": [0, 1, 6, 7],
        "k": [2, 3, 8, 9],
        "v": [4, 5, 10, 11],
    }
    bias = split(TensorRow("encoder_kv.bias", (8,), ("k", "v"), head_dim=2), np.arange(8))
    assert {part: rows.tolist() for part, rows in bias.items()} == {"k": [0, 1, 4, 5], "v": [2, 3, 6, 7]}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", ["base", "cross-only"])
def test_join_is_the_exact_inverse_of_split(name: str, dtype: Any) -> None:
    config, rng = CONFIGS[name], np.random.default_rng(0)
    for row in table(config):
        tensor = rng.normal(size=row.shape).astype(dtype)
        parts = split(row, tensor)
        assert all(part.shape == row.part_shape and part.flags.c_contiguous for part in parts.values())
        joined = join(row, parts)
        assert (joined.dtype, joined.tobytes()) == (tensor.dtype, tensor.tobytes())


def test_a_wrong_shape_is_named() -> None:
    row = next(row for row in table(BASE) if row.name == "middle_block.1.encoder_kv.weight")
    with pytest.raises(ValueError, match=r"middle_block.1.encoder_kv.weight has shape \(128, 32\); .* \(128, 32, 1\)"):
        split(row, np.zeros((128, 32)))
    parts = {part: np.zeros((64, 32)) for part in row.parts}
    parts["mid_block.attentions.0.add_v_proj.weight"] = np.zeros((32, 64))
    with pytest.raises(ValueError, match=r"add_v_proj.weight has shape \(32, 64\); .* \(64, 32\)"):
        join(row, parts)


@pytest.mark.parametrize("name", [*PARAMETERS, *CONFIGS])
def test_configurations_survive_the_round_trip_through_a_file(name: str) -> None:
    yaml = pytest.importorskip("yaml")
    config = {**UNETS, **CONFIGS}[name]
    content = yaml.safe_load(yaml.safe_dump(unet_config_to_deepfloyd(config)))
    assert content == unet_config_to_deepfloyd(config)
    assert unet_config_from_deepfloyd(content) == unet_config_from_deepfloyd(content["params"]) == config


def test_the_published_configuration_is_read_and_written() -> None:
    config = UNETS["IF-I-XL"]
    assert unet_config_from_deepfloyd({"params": PUBLISHED_I_XL}) == config
    switches = {"efficient_activation": False, "scale_skip_connection": False}  # absent there
    assert unet_config_to_deepfloyd(config, "float16") == {"params": {**PUBLISHED_I_XL, **switches}}


def test_widths_survive_the_cut_of_the_original() -> None:
    """It computes int(multiplier * model_channels), which a rounded quotient may miss by one."""
    three = replace(BASE, block_out_channels=(32,) * 3, layers_per_block=(1,) * 3, attention_levels=(False,) * 3)
    for first in (96, 224, 352):
        for width in range(32, 20 * first, 32):
            widths = [first, width, 20 * first]
            config = replace(three, block_out_channels=tuple(widths), time_embedding_dim=20 * first)
            multipliers = unet_config_to_deepfloyd(config)["params"]["channel_mult"]
            if isinstance(multipliers, str):
                multipliers = list(map(int, multipliers.split(",")))
            assert [int(multiplier * first) for multiplier in multipliers] == widths


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"attention_resolutions": [2, 4, 8]}, {}),  # a list has rates
        ({"attention_resolutions": "8, 16, 32, 4"}, {}),  # no level has 4 pixels
        ({"channel_mult": [1, 2, 3, 4], "num_res_blocks": [3, 3, 3, 3]}, {}),
        ({"disable_self_attentions": "32,16,8"}, {"only_cross_attention": True}),
        ({"attention_resolutions": [2, 4, 8], "disable_self_attentions": True}, {"only_cross_attention": True}),
        ({"disable_self_attentions": True}, {}),  # the original disables nothing: it compares rates with characters
        ({"precision": "bf16", "num_heads": 7, "conv_resample": False, "num_classes": None}, {}),
        ({"scale_skip_connection": True}, SCALED),
        ({"efficient_activation": True}, EFFICIENT),
    ],
)
def test_values_mean_what_the_original_makes_of_them(change: dict[str, Any], expected: dict[str, Any]) -> None:
    assert unet_config_from_deepfloyd({**PUBLISHED_I_XL, **change}) == replace(UNETS["IF-I-XL"], **expected)


def test_absent_keys_take_the_defaults_of_the_original() -> None:
    values = {name: value for name, value in PUBLISHED_I_XL.items() if name != "channel_mult"}
    assert unet_config_from_deepfloyd(values).block_out_channels == (704, 1408, 2816, 5632)
    with pytest.raises(ValueError) as error:
        unet_config_from_deepfloyd(
            {name: values[name] for name in values if not name.startswith(("use", "res", "num_h"))}
        )
    for phrase in ("use_scale_shift_norm=False", "resblock_updown=False", "num_head_channels=-1"):
        assert phrase in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "gelu_jit"}, "activation='gelu_jit' .must be 'gelu'"),
        ({"dropout": 0.1}, "dropout=0.1 .must be 0"),
        ({"dims": 1}, "dims=1"),
        ({"num_classes": 10}, "num_classes=10"),
        ({"interpolate_mode": "nearest"}, "interpolate_mode='nearest'"),
        ({"new_switch": False}, "new_switch=False .unknown"),
        ({"channel_mult": "2,4"}, "channel_mult='2,4' .must start with 1"),
        ({"channel_mult": [1, 2, 3, 3.5]}, r"channel_mult=\[1, 2, 3, 3.5\]"),
        ({"channel_mult": "1,x"}, "channel_mult='1,x' must be positive numbers"),
        ({"channel_mult": []}, r"channel_mult=\[\]"),
        ({"num_res_blocks": [3, 3]}, r"num_res_blocks=\[3, 3\]"),
        ({"num_res_blocks": [3, 0, 3, 3]}, r"num_res_blocks=\[3, 0, 3, 3\]"),
        ({"num_res_blocks": "3,3,3,3"}, "num_res_blocks='3,3,3,3'"),
        ({"attention_resolutions": 32}, "attention_resolutions=32 must be positive numbers"),
        ({"attention_resolutions": ""}, "attention_resolutions='' must be positive numbers"),
        ({"attention_resolutions": "32,0"}, "attention_resolutions='32,0' must be positive numbers"),
        ({"disable_self_attentions": "16"}, "disable_self_attentions='16' .must name all"),
        ({"attention_resolutions": [2, 4], "disable_self_attentions": True}, "disable_self_attentions=True"),
        ({"num_head_channels": None}, "num_head_channels=None"),
        ({"encoder_channels": 4096}, "encoder_channels=4096 .equals encoder_dim"),
        ({"in_channels": 4}, "in_channels=4 .must be 3, or 6"),
        ({"encoder_dim": None, "image_size": None}, "lacks image_size, encoder_dim;"),
    ],
)
def test_what_our_unet_cannot_express_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unet_config_from_deepfloyd({**PUBLISHED_I_XL, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_num_groups": 16}, "norm_num_groups=16 .only 32"),
        ({"norm_eps": 1e-6}, "norm_eps=1e-06 .only 1e-05"),
        ({"time_embedding_dim": None}, "time_embedding_dim=None .only 64, the widest level; here 128"),
        ({"block_out_channels": (64, 96)}, r"block_out_channels=\(64, 96\) .the widest only a multiple"),
        ({"layers_per_block": (0, 2)}, r"layers_per_block=\(0, 2\) .only positive"),
        ({"resnet_skip_time_act": True}, "resnet_skip_time_act=True .only as time_embedding_act"),
        ({"resnet_out_scale_factor": math.sqrt(2)}, "resnet_out_scale_factor=1.41421356.* .only 1 or 1/0.7071"),
        ({"mid_block_scale_factor": SCALE}, "mid_block_scale_factor=1.41422.* .only as resnet_out_scale_factor"),
        ({"cross_attention_dim": 64, "encoder_hid_dim": 64}, "cross_attention_dim=64 .only unlike encoder_hid_dim"),
        ({"in_channels": 6}, "in_channels=6 .only 3 with aug_level_embedding=False"),
        ({"aug_level_embedding": True}, "in_channels=3 .only 6 with aug_level_embedding=True"),
    ],
)
def test_what_their_layout_cannot_express_is_refused_by_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unet_config_to_deepfloyd(replace(BASE, **change))


def test_all_that_is_refused_is_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"norm_eps=.*; layers_per_block="):
        unet_config_to_deepfloyd(replace(BASE, norm_eps=1e-6, layers_per_block=(0, 1)))
    with pytest.raises(ValueError, match=r"dropout=.*; out=1 .unknown.; in_channels="):
        unet_config_from_deepfloyd({**PUBLISHED_I_XL, "dropout": 0.1, "in_channels": 4, "out": 1})
    with pytest.raises(ValueError, match="dtype='float64' must be one of float32, float16, bfloat16"):
        unet_config_to_deepfloyd(BASE, "float64")


def original(config: UNetConfig, dtype: str = "float32") -> Any:
    """The net that the original code builds from our config.yml; its low-resolution image gets no noise here."""
    pytest.importorskip("torch")
    pytest.importorskip("deepfloyd_if")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it scripts an activation, as torch no longer likes
        from deepfloyd_if.model.unet import SuperResUNetModel, UNetModel
    params = unet_config_to_deepfloyd(config, dtype)["params"]
    if not config.aug_level_embedding:
        return UNetModel(**params).eval()
    return SuperResUNetModel(low_res_diffusion=SimpleNamespace(q_sample=lambda x, t: x), **params).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_original_builds_the_same_tensors_in_the_same_order(name: str) -> None:
    state = original(CONFIGS[name], "bfloat16").state_dict()
    assert [(name, tuple(tensor.shape)) for name, tensor in state.items()] == [
        (row.name, row.shape) for row in table(CONFIGS[name])
    ]
    position = "encoder_pooling.1.positional_embedding"  # made in float32 whatever the precision
    assert {str(tensor.dtype) for name, tensor in state.items() if name != position} == {"torch.bfloat16"}


@pytest.mark.parametrize("name", ["base", "super-resolution"])
def test_the_original_computes_the_same(name: str) -> None:
    config, tensors = CONFIGS[name], random_tensors(CONFIGS[name])
    net = original(config)
    torch = pytest.importorskip("torch")

    net.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
    rng, side, steps = np.random.default_rng(1), config.sample_size, np.array([3, 977])
    x_t = rng.normal(size=(2, side, side, config.in_channels)).astype(np.float32)
    text = rng.normal(size=(2, 77, config.encoder_hid_dim)).astype(np.float32)
    planes = torch.from_numpy(np.moveaxis(x_t, -1, 1).copy())
    low_res = {"low_res": planes[:, 3:], "aug_level": 0.25} if config.aug_level_embedding else {}
    with torch.no_grad():
        theirs = net(planes[:, :3], torch.tensor(steps), text_emb=torch.tensor(text), **low_res)
    theirs = np.moveaxis(theirs.numpy(), 1, -1)

    opened = names.lazy_from_torch(to_diffusers(config, tensors), abstract_params(config), "unet")
    params = load_params(opened)
    aug_level = (np.full(2, 250),) if config.aug_level_embedding else ()
    ours = jax.jit(UNet(config).apply)({"params": params}, x_t, steps, text, *aug_level)
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
