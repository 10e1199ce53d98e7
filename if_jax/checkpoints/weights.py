"""The weights of one network: config.json beside a safetensors file with the tensor names of torch."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from if_jax.checkpoints import names
from if_jax.checkpoints.tensors import read_tensors, write_json, write_tensors
from if_jax.models.t5 import T5Config, T5Encoder
from if_jax.models.unet import UNet, UNetConfig
from if_jax.text.tokens import TEXT_LENGTH

Params = Any
DIFFUSERS_VERSION = "0.37.0"  # the oldest diffusers that these files are tested with
STEMS = {"unet": "diffusion_pytorch_model", "text_encoder": "model"}  # part of a release → name of its weight file


@functools.cache
def abstract_params(config: UNetConfig | T5Config) -> Params:
    """Shapes of a network's parameters, without making any: a nested dict of ShapeDtypeStruct."""
    if isinstance(config, T5Config):
        module, inputs = T5Encoder(config), [((1, TEXT_LENGTH), jnp.int32)] * 2
    else:
        module, side = UNet(config), config.size_multiple
        inputs = [((1, side, side, config.in_channels), jnp.float32), ((1,), jnp.int32)]
        inputs.append(((1, TEXT_LENGTH, config.encoder_hid_dim), jnp.float32))
        inputs += [((1,), jnp.int32)] * config.aug_level_embedding
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in inputs]
    return nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *shapes)["params"])


def text_encoder_sha256(params: Params) -> str:
    """Identity of a text encoder: SHA-256 over its float32 tensors and their names, whatever file holds them."""
    lines = []
    for name, tensor in names.to_torch(params, "t5"):
        content = hashlib.sha256(np.ascontiguousarray(tensor, np.float32)).hexdigest()
        lines.append(f"{name} {tuple(tensor.shape)} {content}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def write_config(path: Path, content: Mapping) -> None:
    """Write one component's configuration into its new folder."""
    path.parent.mkdir(parents=True)
    write_json(path, content | {"_diffusers_version": DIFFUSERS_VERSION})


def write_params(folder: Path, part: str, config: Mapping, params: Params, dtype: str, metadata: Mapping) -> None:
    """Write config.json and the weights of a `part` of STEMS, one tensor in memory at a time."""
    write_config(folder / "config.json", config)
    kind = _kind(part)
    # Views of one zero have the shapes and cost nothing, so the arrays themselves are visited once, while writing.
    hollow = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), params)
    shapes = {name: tuple(tensor.shape) for name, tensor in names.to_torch(hollow, kind)}

    def dtype_of(name: str) -> str:
        return "float32" if dtype == "float16" and name.endswith("DenseReluDense.wo.weight") else dtype

    path = folder / f"{STEMS[part]}.safetensors"
    write_tensors(path, shapes, names.to_torch(params, kind), dtype_of, {"format": "pt", **metadata})


def read_params(folder: Path, part: str, config: UNetConfig | T5Config, dtype: str | None) -> tuple[Params, dict]:
    """The weights of a `part` of STEMS as NumPy arrays (float32 unless `dtype` names another), and their metadata."""
    get, found, metadata = read_tensors(folder, STEMS[part])
    try:
        params = names.from_torch(get, found, abstract_params(config), _kind(part))
    except ValueError as error:
        raise ValueError(f"{folder}: the weights are of another architecture than config.json says: {error}") from None
    target = jnp.dtype(dtype or "float32")
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(target, copy=False), params), metadata


def _kind(part: str) -> str:
    return "t5" if part == "text_encoder" else "unet"
