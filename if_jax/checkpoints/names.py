"""How our parameters and configurations are called in diffusers (UNet) and transformers (T5): tables, and the rules.

A parameter keeps its path; `resnets_0` becomes `resnets.0` for the module lists named below, `kernel`, `scale` and
`embedding` become `weight`, and matrices change their layout: (in, out) -> (out, in), HWIO -> OIHW.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, Literal

import numpy as np

from if_jax.checkpoints.tensors import Lazy
from if_jax.models.conditioning import StatesPart
from if_jax.models.t5 import T5Config
from if_jax.models.unet import UNetConfig

Kind = Literal["unet", "t5", "clip", "inception", "efficientnet", "dinov2"]
Params = Mapping[str, Any]  # nested by module; leaves are arrays, `Lazy` or shapes

MODULE_LISTS = {
    "unet": ("down_blocks", "up_blocks", "resnets", "attentions", "downsamplers", "upsamplers", "to_out"),
    "t5": ("block", "layer"),
    "clip": ("layers",),
    "inception": (),
    "efficientnet": ("_blocks",),
    "dinov2": ("layer",),
}
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
# Stored twice by some writers: the second name is the one we use.
TIED: dict[str, dict[str, str]] = {name: {} for name in MODULE_LISTS}
TIED["t5"] = {"encoder.embed_tokens.weight": "shared.weight"}

# Keys of a diffusers configuration that our UNet computes in one way only: (that value, diffusers' default if absent).
_UNET_FIXED = {
    "act_fn": ("gelu", "silu"),
    "addition_embed_type": ("text", None),
    "addition_time_embed_dim": (None, None),
    "center_input_sample": (False, False),
    "class_embeddings_concat": (False, False),
    "conv_in_kernel": (3, 3),
    "conv_out_kernel": (3, 3),
    "cross_attention_norm": ("group_norm", None),
    "dropout": (0.0, 0.0),
    "encoder_hid_dim_type": ("text_proj", "text_proj"),
    "flip_sin_to_cos": (True, True),
    "freq_shift": (0, 0),
    "mid_block_type": ("UNetMidBlock2DSimpleCrossAttn", "UNetMidBlock2DCrossAttn"),
    "num_attention_heads": (None, None),
    "num_class_embeds": (None, None),
    "projection_class_embeddings_input_dim": (None, None),
    "resnet_time_scale_shift": ("scale_shift", "default"),
    "time_cond_proj_dim": (None, None),
    "time_embedding_type": ("positional", "positional"),
    "timestep_post_act": (None, None),
}
# Keys that IF's kinds of block ignore; written with diffusers' defaults.
_UNET_IGNORED = {
    "attention_type": "default",
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "reverse_transformer_layers_per_block": None,
    "transformer_layers_per_block": 1,
    "upcast_attention": False,
    "use_linear_projection": False,
}
# Keys that are fields of UNetConfig under the same name: diffusers' default if absent (None: must be present).
_UNET_SAME = {
    "sample_size": None,
    "block_out_channels": None,
    "cross_attention_dim": None,
    "encoder_hid_dim": None,
    "in_channels": 4,
    "out_channels": 4,
    "attention_head_dim": 8,
    "addition_embed_type_num_heads": 64,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "mid_block_scale_factor": 1.0,
}
_DOWN_BLOCKS = {True: "SimpleCrossAttnDownBlock2D", False: "ResnetDownsampleBlock2D"}
_UP_BLOCKS = {True: "SimpleCrossAttnUpBlock2D", False: "ResnetUpsampleBlock2D"}

_T5_FIXED = {"feed_forward_proj": ("gated-gelu", "relu")}


def unet_config_to_diffusers(config: UNetConfig) -> dict[str, Any]:
    """The complete config.json of diffusers' `UNet2DConditionModel`; `unet_config_from_diffusers` reads it.

    A net that reads others than T5 alone says so under `text_parts`, which diffusers does not know.
    """
    levels = config.attention_levels
    own = {name: _plain(getattr(config, name)) for name in _UNET_SAME}
    layers = set(config.layers_per_block)
    return {
        "_class_name": "UNet2DConditionModel",
        **{name: value for name, (value, _) in _UNET_FIXED.items()},
        **_UNET_IGNORED,
        **own,
        # A list where levels differ: with one, diffusers' `set_adapters` (weights of LoRAs) fails.
        "layers_per_block": layers.pop() if len(layers) == 1 else list(config.layers_per_block),
        "down_block_types": [_DOWN_BLOCKS[attends] for attends in levels],
        "up_block_types": [_UP_BLOCKS[attends] for attends in reversed(levels)],
        "only_cross_attention": config.only_cross_attention,
        "mid_block_only_cross_attention": None,
        "class_embed_type": "timestep" if config.aug_level_embedding else None,
        "time_embedding_act_fn": "gelu" if config.time_embedding_act else None,
        "time_embedding_dim": config.time_embedding_dim,
        **({"text_parts": [asdict(part) for part in config.text_parts]} if config.text_parts else {}),
    }


def unet_config_from_diffusers(values: Mapping[str, Any]) -> UNetConfig:
    """Reads a config.json of diffusers' `UNet2DConditionModel`.

    Args:
      values: the file's content.

    Returns:
      The same net as our configuration.

    Raises:
      ValueError: IF's UNet cannot express it; names every key in the way.
    """
    own = {name: values.get(name, default) for name, default in _UNET_SAME.items()}
    if absent := [name for name, value in own.items() if value is None]:
        raise ValueError(f"UNet configuration lacks {', '.join(absent)}; it is not one of an IF stage")
    levels = len(own["block_out_channels"])
    for name in ("cross_attention_dim", "attention_head_dim", "sample_size"):
        own[name] = _single(name, own[name])
    down, up = list(values.get("down_block_types", ())), list(values.get("up_block_types", ()))
    attention_levels = tuple(kind == _DOWN_BLOCKS[True] for kind in down)
    only_cross = _single("only_cross_attention", values.get("only_cross_attention", False))
    layers = values.get("layers_per_block", 2)

    problems = _differences(values, _UNET_FIXED)
    problems += _unknown_keys(values, {**_UNET_FIXED, **_UNET_IGNORED, **_UNET_SAME})
    if down != [_DOWN_BLOCKS[a] for a in attention_levels] or len(down) != levels:
        problems.append(f"down_block_types={down}")
    if up != [_UP_BLOCKS[a] for a in reversed(attention_levels)]:
        problems.append(f"up_block_types={up} (must mirror down_block_types)")
    for name, known in (("class_embed_type", "timestep"), ("time_embedding_act_fn", "gelu")):
        if values.get(name) not in (None, known):
            problems.append(f"{name}={values[name]!r}")
    if values.get("mid_block_only_cross_attention") not in (None, only_cross):
        problems.append("mid_block_only_cross_attention unlike only_cross_attention")
    if problems:
        raise ValueError(f"this UNet configuration cannot be expressed: {'; '.join(problems)}")
    own["block_out_channels"] = tuple(own["block_out_channels"])
    return UNetConfig(
        **own,
        layers_per_block=(layers,) * levels if isinstance(layers, int) else tuple(layers),
        attention_levels=attention_levels,
        time_embedding_dim=values.get("time_embedding_dim"),
        aug_level_embedding=values.get("class_embed_type") is not None,
        time_embedding_act=values.get("time_embedding_act_fn") is not None,
        only_cross_attention=only_cross,
        text_parts=tuple(StatesPart(**part) for part in values.get("text_parts", ())),
    )


def t5_config_to_hf(config: T5Config) -> dict[str, Any]:
    """The config.json of transformers' `T5EncoderModel`; `t5_config_from_hf` reads it."""
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        **{field.name: getattr(config, field.name) for field in fields(config)},
        "num_decoder_layers": config.num_layers,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.1,
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "use_cache": True,
    }


def t5_config_from_hf(values: Mapping[str, Any]) -> T5Config:
    """Reads a config.json of a T5 v1.1 model.

    Args:
      values: the file's content.

    Returns:
      The encoder as our configuration.

    Raises:
      ValueError: names what is absent or unlike v1.1.
    """
    if values.get("model_type", "t5") != "t5":
        raise ValueError(f"text encoder has model_type={values['model_type']!r}; only 't5' (v1.1) is known")
    if problems := _differences(values, _T5_FIXED):
        raise ValueError(f"this T5 configuration cannot be expressed: {'; '.join(problems)}")
    names = [field.name for field in fields(T5Config)]
    required = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
    if absent := [name for name in required if name not in values]:
        raise ValueError(f"T5 configuration lacks {', '.join(absent)}")
    return T5Config(**{name: values[name] for name in names if name in values})


def to_torch(params: Params, kind: Kind) -> Iterator[tuple[str, np.ndarray]]:
    """Every parameter under its torch name and in torch's layout, contiguous; one at a time to keep memory small.

    Args:
      params: a network's parameters, arrays or `Lazy`.
      kind: which table of names holds.

    Yields:
      Name and values; (out, in) and OIHW.
    """
    for name, tensor in lazy_torch(params, kind).items():
        yield name, np.ascontiguousarray(tensor)


def lazy_torch(params: Params, kind: Kind) -> dict[str, Lazy]:
    """The same as `to_torch`, each read when it is asked for; the inverse of `lazy_from_torch`."""
    return {_torch_name(path, kind): _transposed(leaf, _to_torch_axes(path, leaf.ndim)) for path, leaf in _walk(params)}


def lazy_from_torch(tensors: Mapping[str, Any], abstract: Params, kind: Kind) -> dict[str, Any]:
    """Parameters under their torch names as our tree, in our layout, each read when it is asked for.

    Args:
      tensors: arrays or `Lazy` by torch name; (out, in) and OIHW.
      abstract: our tree, with the shapes the configuration says; see `weights.abstract_params`.
      kind: which table of names holds.

    Returns:
      The tree with one `Lazy` for each parameter, of the tensor's own dtype.

    Raises:
      ValueError: a tensor is missing, left over or of another shape; nothing has been read.
    """
    wanted = {_torch_name(path, kind): (path, leaf) for path, leaf in _walk(abstract)}
    sources = {name: name for name in tensors if name not in TIED[kind]}
    for alias, name in TIED[kind].items():
        if alias in tensors:
            sources.setdefault(name, alias)
    problems = []
    if missing := sorted(wanted.keys() - sources.keys()):
        problems.append(f"missing {_some(missing)}")
    if extra := sorted(sources.keys() - wanted.keys()):
        problems.append(f"unexpected {_some(extra)}")
    if problems:
        raise ValueError(f"{kind} weights do not fit the configuration: {'; '.join(problems)}")
    tree: dict[str, Any] = {}
    for name, (path, leaf) in wanted.items():
        tensor, axes = tensors[sources[name]], _to_torch_axes(path, len(leaf.shape))
        expected = tuple(leaf.shape[i] for i in axes)
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; the configuration says {expected}")
        _insert(tree, path, _transposed(tensor, tuple(axes.index(i) for i in range(len(axes)))))
    return tree


def _walk(tree: Params, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _walk(value, (*path, name))
        else:
            yield (*path, name), value


def _insert(tree: dict[str, Any], path: tuple[str, ...], value: Lazy) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def layer_name(path: tuple[str, ...], kind: Kind) -> str:
    """The torch name of a layer: ("mid_block", "attentions_0", "to_q") is "mid_block.attentions.0.to_q" there."""
    numbered = re.compile(rf"({'|'.join(MODULE_LISTS[kind])})_(\d+)")
    return ".".join(re.sub(numbered, r"\1.\2", name) if numbered.fullmatch(name) else name for name in path)


def _torch_name(path: tuple[str, ...], kind: Kind) -> str:
    return f"{layer_name(path[:-1], kind)}.{LEAVES.get(path[-1], path[-1])}".lstrip(".")


def _to_torch_axes(path: tuple[str, ...], ndim: int) -> tuple[int, ...]:
    """The transposition from our layout to torch's."""
    if path[-1] != "kernel":
        return tuple(range(ndim))
    return {2: (1, 0), 4: (3, 2, 0, 1)}[ndim]


def _transposed(tensor: Any, axes: Sequence[int]) -> Lazy:
    shape = tuple(tensor.shape[i] for i in axes)
    return Lazy(shape, np.dtype(tensor.dtype), lambda: np.asarray(tensor).transpose(axes))


def _differences(values: Mapping[str, Any], fixed: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """One phrase per key whose value (absent: its default) is not the one we compute."""
    problems = []
    for name, (known, default) in fixed.items():
        value = values.get(name, default)
        if name == "encoder_hid_dim_type" and value is None:
            continue  # diffusers takes text_proj whenever encoder_hid_dim is set
        if value != known:
            problems.append(f"{name}={value!r} (must be {known!r})")
    return problems


def _unknown_keys(values: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """Keys newer than this table that are switched on."""
    own = {"layers_per_block", "down_block_types", "up_block_types", "only_cross_attention", "class_embed_type"}
    own |= {"mid_block_only_cross_attention", "time_embedding_act_fn", "time_embedding_dim", "text_parts"}
    unknown = (name for name in values if name not in known and name not in own and not name.startswith("_"))
    return [f"{name}={values[name]!r} (unknown)" for name in unknown if values[name] not in (None, False)]


def _single(name: str, value: Any) -> Any:
    """A value that diffusers also takes as one value per level (or side): they must all be equal."""
    if isinstance(value, (list, tuple)):
        if len(set(value)) != 1:
            raise ValueError(f"{name}={value} must be the same everywhere")
        return value[0]
    return value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
