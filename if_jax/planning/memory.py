"""Bytes of one device in a training step: the state's, exactly, and what a step needs besides, by estimate."""

from __future__ import annotations

from dataclasses import dataclass

from if_jax.planning.estimate import Case
from if_jax.training.memory import kept_bytes, step_bytes

ROOM = 0.95  # of the memory: above it only a whole compile can say


@dataclass(frozen=True)
class Memory:
    """What a step takes of a device."""

    kinds: dict[str, int]  # bytes by kind, see `step_bytes`, and the compiler's "workspace"
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


class KeptBytes:
    """What one picture's forward pass keeps for the backward one: traced once for each network and remat."""

    def __init__(self) -> None:
        self._known: dict[object, int] = {}

    def of(self, case: Case) -> int:
        """Bytes of one picture."""
        recipe = case.recipe
        key = (recipe.unet, recipe.remat, recipe.lora, recipe.data.crop or recipe.data.size, recipe.compute_dtype)
        if key not in self._known:
            self._known[key] = kept_bytes(recipe, case.text)
        return self._known[key]


def memory_of(case: Case, kept: KeptBytes) -> Memory:
    """Bytes of one device by kind.

    Args:
      case: what is planned.
      kept: what is known of its activations.
    """
    kinds = step_bytes(case.recipe, case.text, case.mesh, activations=False)
    kinds["activations"] = case.rows * kept.of(case)
    return Memory(kinds, case.slice.device_memory)
