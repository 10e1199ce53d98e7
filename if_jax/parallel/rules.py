"""From the logical names of an array's dimensions to its place on the mesh (the vocabulary of T5X).

A rule set is data: (logical name, mesh axes) in order of preference. A dimension takes the first of its rules whose
axes are free in this array and divide it, and is replicated where none does rather than refused, so the 3-channel edge
convolutions need no special case.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Rules = tuple[tuple[str, tuple[str, ...]], ...]

_ALL = ("data", "fsdp", "tensor")
PRESETS: dict[str, Rules] = {
    "dp": (("batch", _ALL),),
    "fsdp": (
        ("batch", _ALL),
        *((name, ("fsdp",)) for name in ("in", "embed", "heads", "mlp", "out")),
    ),
    "fsdp_tp": (
        ("batch", ("data", "fsdp")),
        *((name, ("fsdp",)) for name in ("in", "embed")),
        *((name, ("tensor",)) for name in ("heads", "mlp", "vocab", "out")),
        ("out", ("fsdp",)),  # where the other dimension has taken `tensor`
    ),
}


def spec_for(shape: Sequence[int], names: Sequence[str | None], mesh: Mesh | AbstractMesh, rules: Rules) -> P:
    """The partition of one array: each named dimension takes its first rule whose axes are free and divide it.

    Args:
      shape: of the array.
      names: logical name of each dimension; None: not split.
      mesh: whose axes divide.
      rules: see the module.
    """
    spec: list[tuple[str, ...] | None] = []
    used: set[str] = set()
    for size, name in zip(shape, names, strict=True):
        fitting = (
            axes
            for own, axes in rules
            if own == name and used.isdisjoint(axes) and size % math.prod(mesh.shape[a] for a in axes) == 0
        )
        spec.append(next(fitting, None))
        used.update(spec[-1] or ())
    return P(*spec)


def state_shardings(abstract: Any, mesh: Mesh | AbstractMesh, rules: Rules) -> Any:
    """Shardings for a tree of arrays, of which moments and averages inherit the names of the parameters.

    Args:
      abstract: tree of abstract arrays, some boxed with the logical names of their dimensions.
      mesh: whose axes divide.
      rules: see the module.

    Returns:
      The tree with a `NamedSharding` for each array; what has no names is replicated.
    """

    def boxed(leaf: Any) -> bool:
        return isinstance(leaf, nn.LogicallyPartitioned)

    def place(leaf: Any) -> Any:
        if boxed(leaf) and not hasattr(leaf.value, "ndim"):
            return leaf.value  # no array in the box: Muon's state masks what Adam updates, and the other way round
        # A factored moment (Adafactor's rows and columns) inherits names it has too few dimensions for.
        named = boxed(leaf) and len(leaf.names) == leaf.value.ndim
        spec = spec_for(leaf.value.shape, leaf.names, mesh, rules) if named else P()
        return NamedSharding(mesh, spec)

    return jax.tree.map(place, abstract, is_leaf=boxed)


def gather_convolutions(params: Any, rules: Rules) -> Any:
    """3×3 kernels as convolutions take them: whole along the axes of the batch, split along the others as stored.

    XLA's partitioner (jaxlib 0.10.2) makes wrong gradients, tens of per cent off, for some convolutions whose kernel is
    split both along an axis of the batch and along another one. Only such rule sets are touched; no mesh, no change.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kept = tuple((name, axes) for name, axes in rules if not {*axes} & {*batch_axes(rules)})
    if mesh.empty or not kept:
        return params

    def gather(leaf: jax.Array) -> jax.Array:
        if leaf.ndim != 4:
            return leaf
        return jax.lax.with_sharding_constraint(leaf, spec_for(leaf.shape, (None, None, "in", "out"), mesh, kept))

    return jax.tree.map(gather, params)


def batch_axes(rules: Rules) -> tuple[str, ...]:
    """The mesh axes along which a batch is split."""
    return next(axes for name, axes in rules if name == "batch")


def batch_sharding(mesh: Mesh | AbstractMesh, rules: Rules) -> NamedSharding:
    """Batches are split along their first dimension over every axis the rule set gives to `batch`."""
    return NamedSharding(mesh, P(batch_axes(rules)))


def batch_part(sharding: NamedSharding, batch_size: int) -> tuple[int, int]:
    """The part of a batch that this process reads: (i, n) for the i-th of n equal parts, with its devices' rows.

    Processes whose devices hold the same rows (`tensor` over several of them) read the same part.

    Args:
      sharding: of the batch.
      batch_size: rows of it.
    """
    here = sharding.addressable_devices_indices_map((batch_size,)).values()
    slices = [index[0].indices(batch_size) for index in here if index is not None]
    first, last = min(start for start, _, _ in slices), max(stop for _, stop, _ in slices) - 1
    for count in range(batch_size // (last + 1 - first), 1, -1):
        if batch_size % count == 0 and first * count // batch_size == last * count // batch_size:
            return first * count // batch_size, count
    return 0, 1


def place_part(sharding: NamedSharding, rows: np.ndarray, part: tuple[int, int]) -> jax.Array:
    """A batch on the mesh, of which this process gives a part: each device takes the rows that the sharding says.

    Args:
      sharding: of the batch.
      rows: (B/n, …), this process's part.
      part: (i, n) of `batch_part`.
    """
    size, first = len(rows) * part[1], len(rows) * part[0]

    def of_device(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # every device of this process holds rows
        start, stop, _ = index[0].indices(size)
        return rows[start - first : stop - first]

    return jax.make_array_from_callback((size, *rows.shape[1:]), sharding, of_device)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, P())


def check_batch_size(batch_size: int, mesh: Mesh | AbstractMesh, rules: Rules) -> None:
    """Refuses, before anything is compiled, a batch that the data axes do not divide.

    Raises:
      ValueError: saying a size that does.
    """
    ways = math.prod(mesh.shape[axis] for axis in batch_axes(rules))
    if batch_size % ways:
        raise ValueError(
            f"batch_size {batch_size} does not divide over {ways} devices: use a multiple of {ways}, e.g. "
            f"{max(ways, batch_size // ways * ways)}"
        )
