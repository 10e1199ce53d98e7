"""How much of a device's memory a training step takes, by kind of array; nothing is compiled or allocated.

What the state takes is exact. What the forward pass keeps for the backward one is counted from the traced program, as
written: the compiler fuses some of it away and needs working space besides, so it is an estimate.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from if_jax.checkpoints.weights import Params
from if_jax.config import Recipe
from if_jax.models.conditioning import CLIPShapes
from if_jax.models.t5 import T5Config
from if_jax.parallel import rules
from if_jax.training import randomness, setup

_TRACED = 13  # pictures in the traced batch: a number that is no width, so that what is kept of them is known by it


def step_bytes(
    recipe: Recipe,
    text: T5Config | None,
    mesh: Mesh | AbstractMesh,
    *,
    clip: CLIPShapes | None = None,
    activations: bool = True,
) -> dict[str, int]:
    """Bytes on one device during a training step.

    Args:
      recipe: what is trained.
      text: the frozen text encoder's configuration, where there is one.
      mesh: of the devices, which may be abstract.
      clip: what is read of a CLIP, where one is read.
      activations: whether to count them too, which takes seconds.

    Returns:
      Bytes by kind: "parameters", "EMA", "moments", "gradients" of what is trained, and where there are any "text
      encoder", "CLIP text", "CLIP pictures", "frozen UNet" (of a LoRA), "teacher", "empty caption" and
      "activations".
    """
    parts = setup.make_setup(recipe, text, mesh, clip=clip)
    state = setup.abstract_state(parts)
    sizes = {"parameters": _bytes(state.params), "EMA": _bytes(state.ema), "moments": _bytes(state.opt_state)}
    sizes["gradients"] = sizes["parameters"]
    frozen = setup.abstract_frozen(parts)
    names = {"text_encoder": "text encoder", "unet": "frozen UNet"}
    names |= {"clip_text": "CLIP text", "clip_vision": "CLIP pictures", "teacher": "teacher", "empty": "empty caption"}
    sizes |= {names[name]: _bytes(params) for name, params in frozen.items()}
    if activations:
        ways = math.prod(mesh.shape[axis] for axis in rules.batch_axes(parts.sharding_rules))
        rows = -(-recipe.batch_size // (recipe.accumulate * ways))
        sizes["activations"] = rows * _kept_bytes(parts, state.params, frozen)
    return sizes


def _kept_bytes(parts: setup.TrainingSetup, params: Params, frozen: Params) -> int:
    """Bytes that one picture's forward pass keeps for the backward one, rematerialisation considered."""
    loss = setup.make_loss(parts)
    rows = setup.batch_rows(parts)
    batch = {name: jax.ShapeDtypeStruct((_TRACED, *shape), dtype) for name, (shape, dtype) in rows.items()}

    drawn = jax.eval_shape(partial(randomness.draw, parts.recipe, _TRACED), jax.random.key(0))

    def kept(params: Params, frozen: Params, batch: Any, drawn: Any) -> Any:
        return jax.vjp(lambda params: loss(params, frozen, batch, drawn), params, has_aux=True)[1]

    whole = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (params, frozen))
    leaves = jax.tree.leaves(jax.eval_shape(kept, *whole, batch, drawn))
    own = [leaf for leaf in leaves if leaf.shape and leaf.shape[0] % _TRACED == 0]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in own) // _TRACED


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
