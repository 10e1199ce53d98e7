"""The best ways to train a recipe on a slice: over mesh, parts of the batch and what the backward pass computes again.

Memory decides first, since it takes no compiling. Of what fits, the few (pictures at a time, remat) that a rough model
likes best are compiled; what was compiled serves every mesh, since a device's blocks do not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from if_jax.config import Recipe
from if_jax.models.blocks import Remat
from if_jax.planning.blocks import Block
from if_jax.planning.compiling import Figures
from if_jax.planning.estimate import Case, StepTime, picture_flops, step_time, with_keys
from if_jax.planning.memory import ROOM, Kept, Memory, kept_of_picture, memory_of

COMPILED = 4  # combinations of pictures at a time and remat that are compiled: some 30 blocks each
_MOST_ROWS = 64  # pictures at a time: more is not faster
_REMATS: tuple[Remat, ...] = ("none", "dots", "blocks")
# Operations for each of the network's, the gradients' included, and a guess at the share of peak.
_WORK = {"none": 1.0, "dots": 1.05, "blocks": 4 / 3}
_FEW_ROWS = 0.55  # of the speed is left below 8 pictures at a time, where the compiler folds height into the batch
_GUESSED_SHARE = 0.4

Compile = Callable[[Case], Mapping[Block, Figures]]


@dataclass(frozen=True)
class Candidate:
    """One way to train the recipe on the slice."""

    case: Case
    memory: Memory
    time: StepTime

    def words(self, recipe: Recipe) -> tuple[str, ...]:
        """What differs from a recipe, as `if-jax train` takes it.

        Args:
          recipe: which.
        """
        return changed_words(recipe, self.case.recipe)


def search(
    case: Case, compile_case: Compile, kept: Kept = kept_of_picture, compiled: int = COMPILED
) -> list[Candidate]:
    """All that was planned in full, the fastest first.

    Args:
      case: the recipe as it is, on the slice.
      compile_case: gives the figures of a case's blocks, see `figures_of`.
      kept: bytes that a block keeps of one picture.
      compiled: combinations of pictures at a time and remat that are compiled.

    Raises:
      ValueError: nothing fits.
    """
    fitting = [(own, memory) for own in ways_to_train(case) if (memory := memory_of(own, kept)).total <= _room(memory)]
    if not fitting:
        raise ValueError(
            f"{case.recipe.unet} with {case.recipe.optimizer.name} does not fit {case.slice.name} in any mesh, part "
            "of the batch or remat: plan more chips, chips with more memory, or optimizer.name=adafactor"
        )
    guesses: dict[tuple[int, str], float] = {}
    for own, _ in fitting:
        combination = (own.core_rows, own.recipe.remat)
        guesses[combination] = min(guesses.get(combination, float("inf")), rough_seconds(own))
    chosen = sorted(guesses, key=lambda combination: guesses[combination])[:compiled]
    figures: dict[tuple[int, str], Mapping[Block, Figures]] = {}
    candidates = []
    for own, memory in fitting:
        combination = (own.core_rows, own.recipe.remat)
        if combination not in chosen:
            continue
        if combination not in figures:
            figures[combination] = compile_case(own)
        candidates.append(Candidate(own, memory, step_time(own, figures[combination], memory.kinds)))
    return sorted(candidates, key=lambda candidate: (candidate.time.step.middle, candidate.time.step.worst))


def ways_to_train(case: Case) -> Iterator[Case]:
    """Meshes × parts of the batch × remat that divide the recipe's batch; `tensor` stays 1.

    Args:
      case: recipe and slice.
    """
    devices, recipe = case.slice.devices, case.recipe
    for fsdp in (size for size in range(1, devices + 1) if devices % size == 0 and size & (size - 1) == 0):
        data = devices // fsdp
        if data % case.slice.count:
            continue
        rules = "fsdp" if fsdp > 1 else "dp"
        for parts in range(1, recipe.batch_size // devices + 1):
            rows, rest = divmod(recipe.batch_size, parts * devices)
            if rest or rows > _MOST_ROWS:
                continue
            for remat in _REMATS:
                mesh = {"data": data, "fsdp": fsdp, "tensor": 1, "rules": rules}
                yield with_keys(case, mesh=mesh, accumulate=parts, remat=remat)


def rough_seconds(case: Case) -> float:
    """A step's time without the compiler: operations at a guessed share of peak."""
    work = case.recipe.batch_size * picture_flops(case) * _WORK[case.recipe.remat]
    speed = _GUESSED_SHARE * (1.0 if case.core_rows % 8 == 0 else _FEW_ROWS if case.core_rows < 8 else 0.9)
    return work / (case.slice.chips * case.slice.generation.peak_flops * speed)


def changed_words(before: Recipe, after: Recipe) -> tuple[str, ...]:
    """What must be set to come from one recipe to another, of what a search changes.

    Args:
      before: the recipe as it is.
      after: as it was planned.
    """
    rows = [("accumulate", before.accumulate, after.accumulate), ("remat", before.remat, after.remat)]
    rows += [
        (f"mesh.{name}", getattr(before.mesh, name), getattr(after.mesh, name))
        for name in ("data", "fsdp", "tensor", "rules")
    ]
    changes = [(name, new) for name, old, new in rows if old != new]
    # What the other axes leave is what -1 means, so that the recipe's own -1 stays.
    return tuple(
        f"--config.{name}={new}" for name, new in changes if not (name == "mesh.data" and before.mesh.data == -1)
    )


def _room(memory: Memory) -> float:
    return ROOM * memory.limit
