"""`config.yml` of DeepFloyd's own release, to and from our configuration of a UNet.

Facts from `deepfloyd_if` 1.0.1: `model/unet.py` (arguments of the two nets) and `modules/stage_*.py` (config.yml's
`params` are those arguments; which of the two nets a folder holds is written nowhere, only the number of input channels
tells).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from if_jax.models.presets import SCALE
from if_jax.models.unet import UNetConfig

# What the original computes in one way only, whatever config.yml says.
_NORM_GROUPS, _NORM_EPS = 32, 1e-5
_CHANNELS = {False: 3, True: 6}  # into a base net; into a super-resolution net: with the low-resolution image
# Arguments that our UNet computes in one way only: (that value, the original's default if absent).
_FIXED = {
    "activation": ("gelu", None),  # "gelu_jit" is the tanh form, another function
    "dims": (2, 2),
    "dropout": (0, 0),
    "interpolate_mode": ("bilinear", "bilinear"),
    "num_classes": (None, None),
    "resblock_updown": (True, False),
    "use_scale_shift_norm": (True, False),
}
# Without effect once the above hold and heads are given by their width; precision is that of the tensors in the file.
_IGNORED = ("conv_resample", "num_heads", "num_heads_upsample", "precision")
_REQUIRED = (
    *("image_size", "in_channels", "model_channels", "out_channels", "num_res_blocks", "attention_resolutions"),
    *("activation", "encoder_dim", "encoder_channels", "att_pool_heads"),
)
_OPTIONAL = {
    "channel_mult": (1, 2, 4, 8),
    "disable_self_attentions": None,
    "efficient_activation": False,
    "num_head_channels": -1,
    "scale_skip_connection": False,
}
_PRECISIONS = {"float32": "32", "float16": "16", "bfloat16": "bf16"}


def unet_config_from_deepfloyd(values: Mapping[str, Any]) -> UNetConfig:
    """Reads a config.yml.

    Args:
      values: the file's content, with or without its top-level `params`.

    Returns:
      The same net as our configuration.

    Raises:
      ValueError: our UNet cannot express it; names every key in the way.
    """
    params = values.get("params", values) or {}
    if absent := [name for name in _REQUIRED if params.get(name) is None]:
        raise ValueError(f"config.yml lacks {', '.join(absent)}; it is not one of an IF stage")
    p = {**_OPTIONAL, **params}
    multipliers = _numbers("channel_mult", p)
    rates = [2**level for level in range(len(multipliers))]
    attended, cross_only = _rates("attention_resolutions", p), _rates_without_self_attention(p)
    # The middle of the net attends always, at the rate of the last level.
    without_self = {rate in cross_only for rate in rates if rate in attended or rate == rates[-1]}
    layers = p["num_res_blocks"]
    layers = tuple(layers) if isinstance(layers, Sequence) else (layers,) * len(rates)

    if problems := _inexpressible_params(p, multipliers, layers, without_self):
        raise ValueError(f"this config.yml cannot be expressed: {'; '.join(problems)}")
    base, time_dim = p["model_channels"], int(p["model_channels"] * max(multipliers))
    efficient, scale = bool(p["efficient_activation"]), SCALE if p["scale_skip_connection"] else 1.0
    return UNetConfig(
        sample_size=p["image_size"],
        block_out_channels=tuple(int(m * base) for m in multipliers),
        layers_per_block=layers,
        attention_levels=tuple(rate in attended for rate in rates),
        cross_attention_dim=p["encoder_channels"],
        encoder_hid_dim=p["encoder_dim"],
        in_channels=p["in_channels"],
        out_channels=p["out_channels"],
        attention_head_dim=p["num_head_channels"],
        addition_embed_type_num_heads=p["att_pool_heads"],
        time_embedding_dim=None if time_dim == 4 * base else time_dim,
        norm_num_groups=_NORM_GROUPS,
        norm_eps=_NORM_EPS,
        aug_level_embedding=p["in_channels"] == _CHANNELS[True],
        time_embedding_act=efficient,
        resnet_skip_time_act=efficient,
        resnet_out_scale_factor=scale,
        mid_block_scale_factor=scale,
        only_cross_attention=without_self == {True},
    )


def unet_config_to_deepfloyd(config: UNetConfig, dtype: str = "float32") -> dict[str, Any]:
    """The content of config.yml.

    Args:
      config: the net.
      dtype: precision of pytorch_model.bin: the original casts its inputs to it, but not the tensors.

    Returns:
      `params` and what stands below it.

    Raises:
      ValueError: the layout cannot express the net; names every field in the way.
    """
    c = config
    if problems := _inexpressible_fields(c):
        raise ValueError(f"DeepFloyd's layout cannot express {'; '.join(problems)}")
    if dtype not in _PRECISIONS:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(_PRECISIONS)}")
    base, last = c.block_out_channels[0], len(c.block_out_channels) - 1
    multipliers = [_multiplier(width, base) for width in c.block_out_channels]
    whole = all(isinstance(m, int) for m in multipliers)
    sides = [c.sample_size // 2**level for level in range(last + 1)]
    attended = [side for side, attends in zip(sides, c.attention_levels, strict=True) if attends]
    without_self = [side for side in sides if side in attended or side == sides[-1]] if c.only_cross_attention else []
    params = {
        "image_size": c.sample_size,
        "in_channels": c.in_channels,
        "out_channels": c.out_channels,
        "model_channels": base,
        "channel_mult": _joined(multipliers) if whole else multipliers,
        "num_res_blocks": c.layers_per_block[0] if len(set(c.layers_per_block)) == 1 else list(c.layers_per_block),
        "attention_resolutions": _joined(attended) if attended else [],  # the original does not parse ""
        "disable_self_attentions": _joined(without_self) if without_self else False,
        "num_heads": 1,
        "num_head_channels": c.attention_head_dim,
        "num_heads_upsample": -1,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
        "dropout": 0.0,
        "activation": "gelu",
        "encoder_dim": c.encoder_hid_dim,
        "encoder_channels": c.cross_attention_dim,
        "att_pool_heads": c.addition_embed_type_num_heads,
        "efficient_activation": c.resnet_skip_time_act,
        "scale_skip_connection": c.resnet_out_scale_factor != 1,
        "precision": _PRECISIONS[dtype],
    }
    return {"params": params}


def _inexpressible_params(
    p: Mapping[str, Any], multipliers: Sequence[float], layers: tuple[int, ...], without_self: set[bool]
) -> list[str]:
    """One phrase for every key of config.yml that our UNet has no field for."""
    fixed = {name: (p.get(name, default), known) for name, (known, default) in _FIXED.items()}
    problems = [f"{name}={value!r} (must be {known!r})" for name, (value, known) in fixed.items() if value != known]
    known_names = {*_REQUIRED, *_OPTIONAL, *_FIXED, *_IGNORED}
    problems += [f"{name}={p[name]!r} (unknown)" for name in p if name not in known_names]
    rules = {
        # The sinusoid has model_channels values, the step embedding model_channels * max(channel_mult).
        "channel_mult": (multipliers[:1] == [1] and not max(multipliers) % 1, "must start with 1, the largest whole"),
        "num_res_blocks": (
            len(layers) == len(multipliers) and all(isinstance(n, int) and n > 0 for n in layers),
            "must be a positive number, or one for each of channel_mult",
        ),
        "disable_self_attentions": (
            len(without_self) < 2,
            "must name all resolutions that attend or none; the middle block attends at the last",
        ),
        "num_head_channels": ((p["num_head_channels"] or 0) > 0, "must be the width of every head"),
        "encoder_channels": (p["encoder_channels"] != p["encoder_dim"], "equals encoder_dim: no text projection"),
        "in_channels": (p["in_channels"] in _CHANNELS.values(), "must be 3, or 6 for super-resolution"),
    }
    return problems + [f"{name}={p[name]!r} ({reason})" for name, (holds, reason) in rules.items() if not holds]


def _inexpressible_fields(c: UNetConfig) -> list[str]:
    """One phrase for every field of our configuration that config.yml has no words for."""
    widest, channels = max(c.block_out_channels), _CHANNELS[c.aug_level_embedding]
    scales = (c.resnet_out_scale_factor, c.mid_block_scale_factor)
    rules = {
        "norm_num_groups": (c.norm_num_groups == _NORM_GROUPS, f"only {_NORM_GROUPS}"),
        "norm_eps": (c.norm_eps == _NORM_EPS, f"only {_NORM_EPS}"),
        "block_out_channels": (widest % c.block_out_channels[0] == 0, "the widest only a multiple of the first"),
        "time_embedding_dim": (c.time_dim == widest, f"only {widest}, the widest level; here {c.time_dim}"),
        "layers_per_block": (min(c.layers_per_block) > 0, "only positive"),
        "resnet_skip_time_act": (c.resnet_skip_time_act == c.time_embedding_act, "only as time_embedding_act"),
        "resnet_out_scale_factor": (scales[0] in (1, SCALE), "only 1 or 1/0.7071"),
        "mid_block_scale_factor": (scales[0] == scales[1], "only as resnet_out_scale_factor"),
        "cross_attention_dim": (c.cross_attention_dim != c.encoder_hid_dim, "only unlike encoder_hid_dim"),
        "in_channels": (c.in_channels == channels, f"only {channels} with aug_level_embedding={c.aug_level_embedding}"),
    }
    return [f"{name}={getattr(c, name)!r} ({reason})" for name, (holds, reason) in rules.items() if not holds]


def _numbers(name: str, p: Mapping[str, Any]) -> Sequence[float]:
    """The entries of "1,2,4" or of a list, all positive."""
    value = p[name]
    try:
        entries = [int(entry) for entry in value.split(",")] if isinstance(value, str) else list(value)
        if all(entry > 0 for entry in entries):
            return entries
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{name}={value!r} must be positive numbers: 'a,b,c' or a list")


def _rates(name: str, p: Mapping[str, Any]) -> set[float]:
    """Downsampling rates: a string names the sides of the feature maps, a list the rates themselves."""
    entries = _numbers(name, p)
    return {p["image_size"] // side for side in entries} if isinstance(p[name], str) else set(entries)


def _rates_without_self_attention(p: Mapping[str, Any]) -> set[float]:
    value = p["disable_self_attentions"]
    if not value:
        return set()
    if value is True:
        # The original looks levels up in attention_resolutions as it is given: the characters of a string match none.
        return set() if isinstance(p["attention_resolutions"], str) else _rates("attention_resolutions", p)
    return _rates("disable_self_attentions", p)


def _multiplier(width: int, base: int) -> int | float:
    """The number whose product with `base` the original cuts down to `width`."""
    if width % base == 0:
        return width // base
    quotient = width / base
    return quotient if int(quotient * base) == width else math.nextafter(quotient, math.inf)


def _joined(entries: Sequence[float]) -> str:
    return ",".join(map(str, entries))
