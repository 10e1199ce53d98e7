"""From the logical names of an array's dimensions to its place on the mesh (the vocabulary of T5X).

A rule set is data: logical name → mesh axes. A dimension that its axes do not divide is replicated rather than refused,
so the 3-channel edge convolutions need no special case.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Rules = Mapping[str, tuple[str, ...]]

PRESETS: dict[str, Rules] = {
    "dp": {"batch": ("data", "fsdp", "tensor")},
    "fsdp": {"batch": ("data", "fsdp", "tensor"), "in": ("fsdp",), "embed": ("fsdp",)},
    "fsdp_tp": {
        "batch": ("data", "fsdp"),
        "in": ("fsdp",),
        "embed": ("fsdp",),
        "out": ("tensor",),
        "heads": ("tensor",),
        "mlp": ("tensor",),
        "vocab": ("tensor",),
    },
}


def spec_for(shape: Sequence[int], names: Sequence[str | None], mesh: Mesh, rules: Rules) -> P:
    """The partition of one array: each named dimension takes its rule's axes where they are free and divide it."""
    spec: list[tuple[str, ...] | None] = []
    used: set[str] = set()
    for size, name in zip(shape, names, strict=True):
        axes = tuple(rules.get(name, ())) if name else ()
        fits = bool(axes) and used.isdisjoint(axes) and size % math.prod(mesh.shape[a] for a in axes) == 0
        spec.append(axes if fits else None)
        used.update(axes if fits else ())
    return P(*spec)


def state_shardings(abstract: Any, mesh: Mesh, rules: Rules) -> Any:
    """Shardings for a tree of abstract arrays, some boxed with logical names, which Adam moments and EMA inherit."""

    def boxed(leaf: Any) -> bool:
        return isinstance(leaf, nn.LogicallyPartitioned)

    def place(leaf: Any) -> NamedSharding:
        # A factored moment (Adafactor's rows and columns) inherits names it has too few dimensions for.
        named = boxed(leaf) and len(leaf.names) == leaf.value.ndim
        spec = spec_for(leaf.value.shape, leaf.names, mesh, rules) if named else P()
        return NamedSharding(mesh, spec)

    return jax.tree.map(place, abstract, is_leaf=boxed)


def batch_sharding(mesh: Mesh, rules: Rules) -> NamedSharding:
    """Batches are split along their first dimension over every axis the rule set gives to `batch`."""
    return NamedSharding(mesh, P(tuple(rules["batch"])))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, P())


def check_batch_size(batch_size: int, mesh: Mesh, rules: Rules) -> None:
    """Refuses, before anything is compiled, a batch that the data axes do not divide."""
    ways = math.prod(mesh.shape[axis] for axis in rules["batch"])
    if batch_size % ways:
        raise ValueError(
            f"batch_size {batch_size} does not divide over {ways} devices: use a multiple of {ways}, e.g. "
            f"{max(ways, batch_size // ways * ways)}"
        )
