"""How much of a device's memory a training step takes, by kind of array; nothing is compiled or allocated.

What the state takes is exact. What the forward pass keeps for the backward one is counted from the traced program, as
written: the compiler fuses some of it away and needs working space besides, so it is an estimate.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import Mesh

from if_jax.config import Recipe
from if_jax.models.t5 import T5Config
from if_jax.parallel import rules
from if_jax.training import loop, objective, optimizer

_TRACED = 13  # pictures in the traced batch: a number that is no width, so that what is kept of them is known by it


def step_bytes(recipe: Recipe, text: T5Config | None, mesh: Mesh, *, activations: bool = True) -> dict[str, int]:
    """Bytes on one device of `mesh` (which may be abstract) during a step, by kind.

    text: the frozen text encoder's configuration, where there is one. activations: left out unless wanted, they take
    seconds to count.
    """
    placed, networks = rules.PRESETS[recipe.mesh.rules], objective.make_networks(recipe, text)
    tx = optimizer.make_optimizer(recipe.optimizer, recipe.steps)
    state = loop.abstract_state(recipe, networks, tx, mesh, placed)
    found = {"parameters": _bytes(state.params), "EMA": _bytes(state.ema), "moments": _bytes(state.opt_state)}
    found["gradients"] = found["parameters"]
    frozen = {}
    if recipe.text_encoder_from:
        frozen["text_encoder"] = loop.abstract_text(recipe, networks, mesh, placed)
        found["text encoder"] = _bytes(frozen)
    if activations:
        ways = math.prod(mesh.shape[axis] for axis in rules.batch_axes(placed))
        rows = -(-recipe.batch_size // (recipe.accumulate * ways))
        found["activations"] = rows * _kept_bytes(recipe, networks, state.params, frozen)
    return found


def _kept_bytes(recipe: Recipe, networks: objective.Networks, params: Any, frozen: Any) -> int:
    """Bytes that one picture's forward pass keeps for the backward one, rematerialisation considered."""
    loss = objective.make_loss(networks, recipe)
    batch = {
        name: jax.ShapeDtypeStruct((_TRACED, *shape), dtype) for name, (shape, dtype) in loop.batch_rows(recipe).items()
    }

    def kept(params: Any, frozen: Any, batch: Any, key: jax.Array) -> Any:
        return jax.vjp(lambda params: loss(params, frozen, batch, key), params, has_aux=True)[1]

    unplaced = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (params, frozen))
    leaves = jax.tree.leaves(jax.eval_shape(kept, *unplaced, batch, jax.random.key(0)))
    own = [leaf for leaf in leaves if leaf.shape and leaf.shape[0] % _TRACED == 0]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in own) // _TRACED


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
