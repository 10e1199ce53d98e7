"""From a recipe on a slice to its plan: bytes of a device, seconds of a step, and what a run of them takes."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import jax
from jax.sharding import AbstractMesh

from if_jax.config import Recipe
from if_jax.models import presets
from if_jax.models.flops import t5_flops, unet_flops
from if_jax.models.t5 import T5Config
from if_jax.parallel import rules
from if_jax.parallel.mesh import AXES, resolve_axes
from if_jax.planning import collectives
from if_jax.planning.blocks import Block, PassSettings, Work, t5_blocks, unet_blocks
from if_jax.planning.compiling import Figures
from if_jax.planning.slices import Slice
from if_jax.training import setup

_PRODUCTS = ("convolution", "dense")  # what the compiler's estimates are trusted for
# Of all else the only published time to compare with says that they are this much too slow (docs/plan.md).
_OVERESTIMATE = 2.7


@dataclass(frozen=True)
class Case:
    """A recipe on a slice."""

    recipe: Recipe
    text: T5Config | None  # the frozen text encoder's
    slice: Slice

    @property
    def mesh(self) -> AbstractMesh:
        """The recipe's mesh on the slice's devices.

        Raises:
          ValueError: it does not fit them.
        """
        own = self.recipe.mesh
        return AbstractMesh(resolve_axes(own.data, own.fsdp, own.tensor, self.slice.devices), AXES)

    @property
    def ways(self) -> int:
        """Devices that a batch is split over."""
        axes = rules.batch_axes(rules.PRESETS[self.recipe.mesh.rules])
        return math.prod(self.mesh.shape[axis] for axis in axes)

    @property
    def rows(self) -> int:
        """Pictures that a device computes at a time."""
        return -(-self.recipe.batch_size // (self.recipe.accumulate * self.ways))

    @property
    def core_rows(self) -> int:
        """Pictures that one core, as the compiler sees it, computes at a time."""
        g = self.slice.generation
        return max(1, -(-self.rows * g.devices // g.compiled_cores))

    def check(self) -> None:
        """Refuses what cannot be placed.

        Raises:
          ValueError: one line, with the number that does not divide.
        """
        recipe, mesh = self.recipe, self.mesh
        if recipe.encoders != ("t5",):
            raise ValueError(
                f"recipe key conditioning.encoders is {recipe.conditioning.encoders!r}: a plan knows T5 alone"
            )
        if recipe.distill.method:
            raise ValueError(f"recipe key distill.method is {recipe.distill.method!r}: a plan knows no teacher")
        rules.check_batch_size(recipe.batch_size // recipe.accumulate, mesh, rules.PRESETS[recipe.mesh.rules])
        if mesh.shape["data"] % self.slice.count:
            raise ValueError(
                f"mesh data={mesh.shape['data']} does not divide over {self.slice.count} slices: "
                f"use a multiple of {self.slice.count}"
            )


@dataclass(frozen=True)
class Time:
    """Seconds, with what they may be at best and at worst."""

    middle: float
    best: float
    worst: float

    def times(self, factor: float) -> Time:
        """All three, multiplied."""
        return Time(self.middle * factor, self.best * factor, self.worst * factor)


@dataclass(frozen=True)
class StepTime:
    """Where the time of a step goes."""

    step: Time
    by_kind: dict[str, float]  # seconds by kind of operation (see `KINDS`), "text encoder" and "update" beside them
    by_block: list[tuple[str, int, float]]  # label, times in a pass, seconds in a step
    collectives: dict[str, float]  # seconds if nothing hid them
    peak_share: Time  # of the chip's bfloat16 peak, by the reference network's operations
    failed: dict[str, str]  # blocks without figures: why
    unestimated: dict[str, int]  # operations without an estimate, by name


def work_of(recipe: Recipe) -> tuple[Work, Work]:
    """What is computed of the UNet and of the text encoder."""
    text: Work = "train"
    if recipe.text_encoder_from:
        text = "inputs" if recipe.new_words.tokens or recipe.lora.text_encoder else "forward"
    return "inputs" if recipe.keeps_base else "train", text


def blocks_of(case: Case) -> tuple[Counter[Block], Counter[Block]]:
    """The blocks of the UNet and of the text encoder, and how often each runs for one part of the batch."""
    recipe, length = case.recipe, case.recipe.text_length
    unet_work, text_work = work_of(recipe)
    side = recipe.data.crop or recipe.data.size
    common = {"rows": case.core_rows, "dtype": recipe.compute_dtype, "text_length": length}
    unet = unet_blocks(
        presets.UNETS[recipe.unet], (side, side), PassSettings(work=unet_work, remat=recipe.remat, **common)
    )
    if recipe.data.embeddings:
        return unet, Counter()
    text = case.text or presets.T5_ENCODERS[recipe.text_encoder]
    return unet, t5_blocks(text, PassSettings(work=text_work, **common))


def picture_flops(case: Case) -> float:
    """Operations of one picture in a step, by the reference networks: nothing that is computed twice counts twice."""
    recipe, side = case.recipe, case.recipe.data.crop or case.recipe.data.size
    unet_work, text_work = work_of(recipe)
    passes = {"forward": 1, "inputs": 2, "train": 3}
    total = passes[unet_work] * unet_flops(presets.UNETS[recipe.unet], side, recipe.text_length)
    if not recipe.data.embeddings:
        text = case.text or presets.T5_ENCODERS[recipe.text_encoder]
        total += passes[text_work] * t5_flops(text, recipe.text_length)
    return total


def step_time(case: Case, figures: Mapping[Block, Figures], memory: Mapping[str, int]) -> StepTime:
    """How long a step takes.

    Args:
      case: what is planned.
      figures: of its blocks, see `figures_of`.
      memory: bytes of a device by kind, see `step_bytes`.
    """
    recipe, g = case.recipe, case.slice.generation
    per_cycle = recipe.accumulate / g.hertz
    if rules.batch_axes(rules.PRESETS[recipe.mesh.rules]) != AXES:  # the others of `tensor` share the work
        per_cycle /= case.mesh.shape["tensor"]
    kinds: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    rows, failed = [], {}
    unet, text = blocks_of(case)
    trusted = other = 0.0
    for counted, is_text in ((unet, False), (text, True)):
        for block, times in counted.items():
            own = figures[block]
            if "error" in own:
                failed[block.label()] = own["error"]
                continue
            for kind, cycles in own["by_kind"].items():
                seconds = cycles * times * per_cycle
                kinds["text encoder" if is_text else kind] += seconds  # type: ignore[reportArgumentType]
                if kind in _PRODUCTS:
                    trusted += seconds
                else:
                    other += seconds
            unknown.update({name: count * times for name, count in own["unestimated"].items()})
            rows.append((block.label(), times, own["cycles"] * times * per_cycle))
    update = update_seconds(case, memory)
    kinds["update"] = update  # type: ignore[reportArgumentType]
    split = 1 if recipe.mesh.rules == "dp" else case.mesh.shape["fsdp"]
    travel = collectives.seconds(traffic_of(case), case.slice, split)
    moving = sum(travel.values())
    step = Time(
        middle=max(trusted + other, moving) + update,
        best=max(trusted + other / _OVERESTIMATE, moving) + update,
        worst=trusted + other + moving + update,
    )
    ideal = recipe.batch_size * picture_flops(case) / (case.slice.chips * g.peak_flops)
    share = Time(ideal / step.middle, ideal / step.worst, ideal / step.best)
    rows.sort(key=lambda row: -row[2])
    return StepTime(step, dict(kinds), rows, travel, share, failed, dict(unknown))


def update_seconds(case: Case, memory: Mapping[str, int]) -> float:
    """Time that optimizer, averages and the adding up of gradients take: bytes of the state over the memory's rate."""
    g = case.slice.generation
    state = sum(memory[name] for name in ("parameters", "EMA", "moments"))
    moved = 2 * state + 2 * memory["gradients"]  # read and written; gradients once for their norm, once for the update
    if case.recipe.accumulate > 1:
        moved += 3 * case.recipe.accumulate * memory["gradients"]
    return moved * g.devices / g.hbm_bandwidth


def traffic_of(case: Case) -> collectives.Traffic:
    """What the devices exchange in a step."""
    recipe = case.recipe
    parts = setup.make_setup(recipe, case.text, case.mesh)
    state, frozen = setup.abstract_state(parts), setup.abstract_frozen(parts)
    gradients, shard = _bytes(state.params)
    unet, own_unet = _bytes(frozen.get("unet", {}))
    text, own_text = _bytes(frozen.get("text_encoder", {}))
    gathered = gradients - shard + unet - own_unet
    gathered += (text - own_text) // 2  # it has a forward pass alone
    return collectives.Traffic(gathered, 2 * recipe.accumulate, gradients, shard, recipe.accumulate)


def with_keys(case: Case, **changes: object) -> Case:
    """The same with other recipe keys; those of the mesh by `mesh`, a dict."""
    mesh = changes.pop("mesh", None)
    recipe = dataclasses.replace(case.recipe, **changes)  # type: ignore[reportArgumentType]
    if isinstance(mesh, dict):
        recipe = dataclasses.replace(recipe, mesh=dataclasses.replace(recipe.mesh, **mesh))
    return dataclasses.replace(case, recipe=recipe)


def _bytes(tree: object) -> tuple[int, int]:
    """Of all arrays whole, and of their parts on one device."""
    leaves = jax.tree.leaves(tree)
    whole = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    own = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    return whole, own
