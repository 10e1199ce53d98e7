"""Frozen kernels in int8: W ≈ Q · s with 8-bit integers Q and one float32 s for each output channel.

Weights alone are rounded, to 1/254 of the largest of their channel; what passes through the layers keeps its precision.
A layer computes (x Q) s. Q becomes floating point inside the layer and is made so again in the backward pass, so that
no whole kernel in floating point outlives its layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from if_jax.models.layers import Conv, Dense, convolve

COLLECTION = "int8"  # of Flax variables


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Kernel:
    """A kernel (…, in, out): values int8 of its shape, scale (out,) float32. Leaves may be abstract, or shardings."""

    values: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel."""
        return self.values.shape

    def astype(self, dtype: DTypeLike) -> jax.Array:
        """The kernel in floating point."""
        return (jnp.asarray(self.values, jnp.float32) * self.scale).astype(dtype)


def quantise(kernel: np.ndarray) -> Int8Kernel:
    """Rounds a kernel (…, in, out) to int8, on the host. A channel of zeros stays zeros."""
    kernel = np.asarray(kernel, np.float32)
    largest = np.abs(kernel).max(axis=tuple(range(kernel.ndim - 1)))
    scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return Int8Kernel(np.rint(kernel / scale).astype(np.int8), scale)


def abstract_kernels(params: Any) -> Any:
    """What `quantise` makes of every kernel of an abstract tree whose leaves know their `NamedSharding`."""

    def quantised(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Any:
        if path[-1].key != "kernel":
            return leaf
        sharding = leaf.sharding
        spec = (*sharding.spec, *(None,) * (leaf.ndim - len(sharding.spec)))
        by_channel = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(spec[-1]))
        return Int8Kernel(
            jax.ShapeDtypeStruct(leaf.shape, jnp.int8, sharding=sharding),
            jax.ShapeDtypeStruct(leaf.shape[-1:], jnp.float32, sharding=by_channel),
        )

    return jax.tree_util.tree_map_with_path(quantised, params)


def split(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parts a tree of parameters into those in floating point and the int8 kernels, each with the paths it had."""
    plain, kernels = {}, {}
    for name, value in params.items():
        if isinstance(value, Int8Kernel):
            kernels[name] = value
        elif isinstance(value, Mapping):
            plain[name], inner = split(value)
            if inner:
                kernels[name] = inner
        else:
            plain[name] = value
    return plain, kernels


def layer_output(layer: Dense | Conv, x: jax.Array) -> jax.Array:
    """What a bound layer whose kernel lies in `COLLECTION` makes of its input."""
    kernel: Int8Kernel = layer.get_variable(COLLECTION, "kernel")

    @jax.checkpoint
    def product(x: jax.Array, kernel: Int8Kernel) -> jax.Array:
        multiply = convolve if len(kernel.shape) == 4 else jnp.matmul
        return multiply(x, kernel.values.astype(layer.dtype)) * kernel.scale.astype(layer.dtype)

    out = product(x.astype(layer.dtype), kernel)
    bias = layer.get_variable("params", "bias")
    return out if bias is None else out + bias.astype(layer.dtype)


def to_float(params: Any, dtype: DTypeLike) -> Any:
    """The same tree with its int8 kernels in floating point."""
    is_kernel = lambda leaf: isinstance(leaf, Int8Kernel)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if is_kernel(leaf) else leaf, params, is_leaf=is_kernel)
