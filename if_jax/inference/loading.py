"""Where the weights of a stage lie while it draws: precision, devices, and for how long."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from if_jax.checkpoints.stages import CLIPEncoder, StageRelease
from if_jax.checkpoints.tensors import Lazy
from if_jax.checkpoints.weights import Params, boxed_params, load_params
from if_jax.diffusion.schedule import Array
from if_jax.parallel.rules import PRESETS, batch_axes, state_shardings

PRECISIONS = ("float32", "bfloat16", "float16")


class Int8(NamedTuple):
    """A matrix (in, out) in 8 bits with one scale for each output channel."""

    values: Array  # (in, out) int8
    scale: Array  # (out,) float32


@dataclass(frozen=True)
class Placement:
    """How a cascade keeps its weights.

    Raises:
      ValueError: at construction, for a precision or a set of rules that does not exist.
    """

    dtype: DTypeLike = jnp.float32  # of matrix products and convolutions
    param_dtype: str = "float32"  # of the UNets' weights on the device
    text_dtype: str = "float32"  # of the text encoder's weights: as above, or int8
    low_memory: bool = False  # a network is read when it is used and dropped right after
    mesh: Mesh | None = None  # None: the first device
    rules: str = "fsdp_tp"  # of `parallel.rules.PRESETS`, for a mesh

    def __post_init__(self) -> None:
        for word, allowed in (("param_dtype", PRECISIONS), ("text_dtype", (*PRECISIONS, "int8"))):
            if getattr(self, word) not in allowed:
                raise ValueError(f"{word} is {getattr(self, word)!r}: use one of {', '.join(allowed)}")
        if self.rules not in PRESETS:
            raise ValueError(f"rules is {self.rules!r}: use one of {', '.join(PRESETS)}")

    @property
    def ways(self) -> int:
        """Over how many devices the pictures of one program are split."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in batch_axes(PRESETS[self.rules]))

    def batch(self, array: Array) -> jax.Array:
        """An array (B, …), or keys, on the device or split over several along its first axis."""
        if self.mesh is None:  # where the weights are: a program is compiled again for a state that lies elsewhere
            return jax.device_put(array, SingleDeviceSharding(jax.devices()[0]))
        return jax.device_put(array, NamedSharding(self.mesh, P(batch_axes(PRESETS[self.rules]))))


def place_unet(stage: StageRelease, placement: Placement) -> Params:
    """The UNet's parameters on the device: straight from the file, tensor by tensor."""
    return _place(stage.unet_params, stage.unet_config, placement, placement.param_dtype)


def place_text(stage: StageRelease, placement: Placement) -> Params:
    """The same for the text encoder of a stage that has one; int8: matrices as `Int8`, everything else bfloat16."""
    if placement.text_dtype != "int8":
        assert stage.text_config is not None and stage.text_params is not None
        return _place(stage.text_params, stage.text_config, placement, placement.text_dtype)
    device = jax.devices()[0] if placement.mesh is None else NamedSharding(placement.mesh, P())

    def load(path: jax.tree_util.KeyPath, leaf: Lazy | Array | Int8) -> jax.Array | Int8:
        if isinstance(leaf, Int8):
            return leaf
        if path[-1].key != "kernel":
            return jax.device_put(np.asarray(leaf, jnp.bfloat16), device)
        return jax.device_put(quantize(np.asarray(leaf, np.float32)), device)

    return jax.tree_util.tree_map_with_path(load, stage.text_params, is_leaf=lambda leaf: isinstance(leaf, Int8))


def place_stage(stage: StageRelease, placement: Placement) -> StageRelease:
    """The stage with its parameters on the device, or (low memory) as they are in the file."""
    if placement.low_memory:
        return stage
    text = None if stage.text_params is None else place_text(stage, placement)
    return replace(stage, unet_params=place_unet(stage, placement), text_params=text, clip=place_clip(stage, placement))


def place_clip(stage: StageRelease, placement: Placement) -> CLIPEncoder | None:
    """The CLIP of a stage that reads one, on the device."""
    if stage.clip is None:
        return None
    configs = {"clip_text": stage.clip.shapes.text, "clip_vision": stage.clip.shapes.vision}
    params = {
        name: _place(own, configs[name], placement, placement.param_dtype) for name, own in stage.clip.params.items()
    }
    return replace(stage.clip, params=params)


def quantize(kernel: np.ndarray) -> Int8:
    """Round a matrix (in, out) to 127 steps either side of zero: the largest weight of an output channel is 127."""
    scale = np.maximum(np.abs(kernel).max(axis=0), 1e-12) / 127
    return Int8(np.rint(kernel / scale).astype(np.int8), scale.astype(np.float32))


def dequantize(params: Params, dtype: DTypeLike) -> Params:
    """Matrices in `dtype` again; inside a compiled program each is made where it is used."""

    def make(leaf: Array | Int8) -> Array:
        return leaf.values.astype(dtype) * leaf.scale.astype(dtype) if isinstance(leaf, Int8) else leaf

    return jax.tree.map(make, params, is_leaf=lambda leaf: isinstance(leaf, Int8))


def _place(params: Params, config: Any, placement: Placement, dtype: str) -> Params:
    if placement.mesh is None:
        single = SingleDeviceSharding(jax.devices()[0])
        return load_params(params, dtype, jax.tree.map(lambda _: single, params))
    shardings = state_shardings(boxed_params(config), placement.mesh, PRESETS[placement.rules])
    return load_params(params, dtype, shardings)
