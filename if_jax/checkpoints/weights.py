"""The weights of one network: config.json beside safetensors files with the tensor names of torch."""

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
from if_jax.checkpoints.files import write_json
from if_jax.checkpoints.names import Params
from if_jax.checkpoints.tensors import BytesWritten, Storage, read_tensors
from if_jax.checkpoints.write_tensors import write_tensors
from if_jax.models.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from if_jax.models.int8 import Int8Kernel, quantise
from if_jax.models.t5 import T5Config, T5Encoder
from if_jax.models.unet import UNet, UNetConfig
from if_jax.text.tokens import TEXT_LENGTH

NetworkConfig = UNetConfig | T5Config | CLIPTextConfig | CLIPVisionConfig
DIFFUSERS_VERSION = "0.37.0"  # the oldest diffusers that these files are tested with
STEMS = {"unet": "diffusion_pytorch_model", "text_encoder": "model"}  # part of a release → name of its weight file


@functools.cache
def abstract_params(config: NetworkConfig) -> Params:
    """Shapes of a network's parameters, without making any: a nested dict of ShapeDtypeStruct."""
    return nn.unbox(boxed_params(config))


@functools.cache
def boxed_params(config: NetworkConfig) -> Params:
    """Shapes of a network's parameters, each in a box with its logical axis names (see `rules.state_shardings`)."""
    if isinstance(config, T5Config):
        module, inputs = T5Encoder(config), [((1, TEXT_LENGTH), jnp.int32)] * 2
    elif isinstance(config, CLIPTextConfig):
        module, inputs = CLIPText(config), [((1, config.max_position_embeddings), jnp.int32)]
    elif isinstance(config, CLIPVisionConfig):
        module, inputs = CLIPVision(config), [((1, config.image_size, config.image_size, 3), jnp.float32)]
    else:
        module, side = UNet(config), config.size_multiple
        inputs = [((1, side, side, config.in_channels), jnp.float32), ((1,), jnp.int32)]
        inputs.append(((1, config.states_length(TEXT_LENGTH), config.states_width), jnp.float32))
        inputs += [((1,), jnp.int32)] * config.aug_level_embedding
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in inputs]
    return jax.eval_shape(module.init, jax.random.key(0), *shapes)["params"]


def text_encoder_sha256(params: Params) -> str:
    """Identity of a text encoder, see `content_sha256`."""
    return content_sha256({"text_encoder": params}, "t5")


def content_sha256(networks: Mapping[str, Params], kind: names.Kind) -> str:
    """SHA-256 over the float32 tensors of networks and their names, whatever files hold them.

    Args:
      networks: their parameters; no two have a tensor of one name.
      kind: which table of names holds.
    """
    lines = []
    for name, tensor in (row for params in networks.values() for row in names.to_torch(params, kind)):
        content = hashlib.sha256(np.ascontiguousarray(tensor, np.float32).data).hexdigest()
        lines.append(f"{name} {tuple(tensor.shape)} {content}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def write_config(path: Path, content: Mapping[str, Any]) -> None:
    """Write one component's configuration into its new folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**content, "_diffusers_version": DIFFUSERS_VERSION})


def stored_specs(params: Params, kind: names.Kind, dtype: str | None) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and precision of every tensor as it is stored.

    Args:
      params: a network's parameters.
      kind: which network.
      dtype: a key of `tensors.DTYPES`, or None for each tensor's own. T5's `wo` stays float32 in float16.

    Returns:
      (shape, key of `tensors.DTYPES`) by torch name, in torch's layout.
    """

    def precision(name: str, own: np.dtype) -> str:
        keep = dtype == "float16" and name.endswith("DenseReluDense.wo.weight")  # as transformers keeps it
        return "float32" if keep else dtype or own.name

    return {
        name: (tensor.shape, precision(name, tensor.dtype)) for name, tensor in names.lazy_torch(params, kind).items()
    }


def write_params(
    folder: Path,
    part: str,
    config: Mapping[str, Any],
    params: Params,
    storage: Storage,
    metadata: Mapping[str, str],
    progress: BytesWritten | None = None,
) -> None:
    """Write config.json and the weights of one network, one tensor in memory at a time.

    Args:
      folder: where they go; it is made.
      part: a key of STEMS.
      config: content of config.json.
      params: the parameters, arrays or `Lazy`.
      storage: precision, shards and variant.
      metadata: for the headers of the weight files.
      progress: called with the bytes written.

    Raises:
      ValueError: a value is not finite, or does not fit the precision.
      OSError: the disk is full.
    """
    write_config(folder / "config.json", config)
    kind = _kind(part)
    specs = stored_specs(params, kind, storage.dtype)
    metadata = {"format": "pt", **metadata}
    write_tensors(folder, STEMS[part], specs, names.to_torch(params, kind), metadata, storage, progress)


def read_params(folder: Path, part: str, config: UNetConfig | T5Config) -> tuple[Params, dict[str, str]]:
    """Open the weights of one network.

    Args:
      folder: holds them.
      part: a key of STEMS.
      config: of the network, from its config.json.

    Returns:
      The parameters, a tree of `Lazy` in stored precision, and the metadata of the files.

    Raises:
      FileNotFoundError: names what is missing.
      ValueError: the files do not fit the configuration.
    """
    tensors, metadata = read_tensors(folder, STEMS[part])
    kind = _kind(part)
    if kind == "t5":  # a whole T5, as Google publishes it, brings a decoder that no encoder needs
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(("decoder.", "lm_head."))}
    for alias, name in names.TIED[kind].items():
        if alias in tensors and name in tensors and not np.array_equal(tensors[alias], tensors[name]):
            raise ValueError(f"{folder}: {alias} and {name} differ, though they are one table; copy the folder again")
    try:
        return names.lazy_from_torch(tensors, abstract_params(config), kind), metadata
    except ValueError as error:
        raise ValueError(f"{folder}: the weights are of another architecture than config.json says: {error}") from None


def load_params(lazy: Params, dtype: str = "float32", shardings: Any = None) -> Params:
    """Read parameters into memory, or straight to their places on a mesh.

    One tensor is read at a time and dropped before the next, so no second copy of the net ever exists.

    Args:
      lazy: a tree of `Lazy`.
      dtype: precision to read them in.
      shardings: the same tree with the place of each; NumPy arrays are made unless given. A kernel whose place is an
        `Int8Kernel` of two shardings is rounded to int8.

    Returns:
      The tree of arrays.
    """

    def load(leaf: Any) -> np.ndarray:
        return np.array(leaf, jnp.dtype(dtype), order="C")

    def spread(values: np.ndarray, sharding: jax.sharding.Sharding, dtype: str) -> jax.Array:
        made = jax.make_array_from_callback(
            values.shape, sharding, lambda index: np.array(values[index], jnp.dtype(dtype), order="C")
        )
        return jax.block_until_ready(made)

    def place(leaf: Any, sharding: jax.sharding.Sharding | Int8Kernel) -> jax.Array | Int8Kernel:
        if isinstance(sharding, Int8Kernel):
            kernel = quantise(np.asarray(leaf))
            values = spread(kernel.values, sharding.values, "int8")
            return Int8Kernel(values, spread(kernel.scale, sharding.scale, "float32"))
        return spread(np.asarray(leaf), sharding, dtype)

    return jax.tree.map(load, lazy) if shardings is None else jax.tree.map(place, lazy, shardings)


def _kind(part: str) -> names.Kind:
    return "t5" if part == "text_encoder" else "unet"
