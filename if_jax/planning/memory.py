"""Bytes of one device in a training step: the state's, exactly, and what a step needs besides, by estimate.

The compiler computes again, from what was kept in the compute precision, what the backward pass needs in float32; and
in memory the channels of an array fill whole lanes of 128. Both show in its scratch for single blocks (docs/plan.md).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from if_jax.config import Recipe
from if_jax.models import presets
from if_jax.models.t5 import T5Config
from if_jax.models.unet import UNetConfig
from if_jax.planning.blocks import Block
from if_jax.planning.compiling import Figures
from if_jax.planning.estimate import Case, blocks_of
from if_jax.planning.programs import block_program, kept_for_gradients
from if_jax.training.memory import step_bytes

ROOM = 0.9  # of the memory: above it only a whole compile can say
_LANES = 128
_TRACED = 13  # pictures that are traced: a number that is no width, so that what is kept of them is known by it

Kept = Callable[[Block], float]  # bytes that a block keeps of one picture


@dataclass(frozen=True)
class Memory:
    """What a step takes of a device."""

    kinds: dict[str, int]  # bytes by kind: those of `step_bytes`, "activations" and "workspace"
    limit: int
    whole: int | None = None  # bytes of the whole step, where that was compiled

    @property
    def total(self) -> int:
        """Bytes of all kinds, or those of the whole step."""
        return self.whole or sum(self.kinds.values())

    @property
    def fits(self) -> bool:
        """Whether it is less than the device has."""
        return self.total <= self.limit


def kept_of_picture(block: Block) -> float:
    """Bytes that a block keeps of one picture from the forward pass for the backward one, rematerialisation considered.

    Args:
      block: which; how many pictures it computes does not matter.
    """
    return _kept(dataclasses.replace(block, rows=_TRACED))


def memory_of(case: Case, kept: Kept = kept_of_picture, figures: Mapping[Block, Figures] | None = None) -> Memory:
    """Bytes of one device by kind.

    Args:
      case: what is planned.
      kept: bytes that a block keeps of one picture.
      figures: of its blocks, where they are compiled: the compiler's own scratch takes the place of a guess.
    """
    alone = dataclasses.replace(case.recipe, accumulate=1, remat="none")  # the state does not depend on them
    kinds = dict(_state_bytes(alone, presets.UNETS[alone.unet], case.text, case.mesh))
    unet, text = blocks_of(case)
    g = case.slice.generation
    per_device = g.compiled_cores / g.devices
    both = unet + text
    kinds["activations"] = math.ceil(
        case.core_rows
        * per_device
        * sum(times * kept(block) for block, times in both.items() if block.work != "forward")
    )
    kinds["workspace"] = math.ceil(
        per_device * max(_scratch(block, kept, (figures or {}).get(block)) for block in both)
    )
    if case.recipe.mesh.rules != "dp":  # the weights of a block and of the next one, gathered
        kinds["workspace"] += 2 * max(_weights(dataclasses.replace(block, rows=_TRACED)) for block in both)
    return Memory(kinds, case.slice.device_memory)


def _scratch(block: Block, kept: Kept, figures: Figures | None) -> float:
    if figures and "scratch" in figures:
        return figures["scratch"]
    scores = 6 * _scores(block)  # in float32, and in the compute precision
    return block.rows * (kept(block) + scores)


@lru_cache(maxsize=256)
def _state_bytes(recipe: Recipe, unet: UNetConfig, text: T5Config | None, mesh: AbstractMesh) -> dict[str, int]:
    """Once for each mesh of a search; the UNet, which the recipe names, tells apart what bears one name."""
    return step_bytes(recipe, text, mesh, activations=False)


@lru_cache(maxsize=1024)
def _kept(block: Block) -> float:
    if block.work == "forward":
        return 0.0
    total, scores = 0, _scores(block)
    for leaf in kept_for_gradients(block):
        if not leaf.shape or leaf.shape[0] != block.rows:
            continue
        *rest, last = leaf.shape
        if scores and math.prod(leaf.shape) == block.rows * scores:
            # Of attention's scores the compiler keeps those in float32, from which it makes the weights again.
            total += math.prod(leaf.shape) * leaf.dtype.itemsize if leaf.dtype == jnp.float32 else 0
        elif leaf.dtype == jnp.dtype(block.dtype):
            total += math.prod(rest) * padded(last) * leaf.dtype.itemsize
    return total / block.rows


def padded(channels: int) -> int:
    """Channels as they lie in memory: few of them are laid out otherwise than in lanes."""
    return -(-channels // _LANES) * _LANES if channels >= _LANES // 4 else channels


def _scores(block: Block) -> int:
    """How many scores an attention block makes of one picture, queries × keys of all heads; of another block none."""
    if block.kind != "attention":
        return 0
    pixels, heads = block["height"] * block["width"], block["features"] // block["head_dim"]
    return heads * pixels * (block["text_length"] + (0 if block["only_cross"] else pixels))


@lru_cache(maxsize=1024)
def _weights(block: Block) -> int:
    _, params, _ = block_program(block)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
