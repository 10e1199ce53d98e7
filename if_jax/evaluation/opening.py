"""How an evaluation opens a cascade: in which precision, with which LoRAs, over the devices of its process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from if_jax.checkpoints.files import sha256_of
from if_jax.checkpoints.lora import open_lora
from if_jax.inference.cascade import Cascade
from if_jax.parallel import mesh as meshes


@dataclass(frozen=True)
class Opening:
    """How a cascade is opened.

    Attributes:
      dtype: what it computes in, and keeps its weights in.
      rules: of `parallel.rules.PRESETS`: "dp" has every device draw its own pictures with all weights, the others split
        the weights of a net that no device holds.
      lora: file -> weight, as for `Cascade.load`.
    """

    dtype: str = "float32"
    rules: str = "dp"
    lora: Mapping[str | Path, float] = field(default_factory=dict)

    def cascade(self, folder: str | Path, stages: int | None = None) -> Cascade:
        """The release, drawing with all devices of this process.

        Args:
          folder: as for `Cascade.load`, which says what it raises.
          stages: read only so many.
        """
        return Cascade.load(
            folder,
            stages=stages,
            dtype=self.dtype,
            param_dtype=self.dtype,
            text_dtype=self.dtype,
            lora=dict(self.lora),
            mesh=local_mesh(self.rules),
            rules=self.rules,
        )

    @property
    def identity(self) -> dict[str, Any]:
        """What the pictures depend on, as JSON values; empty for the defaults. Over how many devices is not of it."""
        identity: dict[str, Any] = {} if self.dtype == "float32" else {"dtype": self.dtype}
        if self.lora:
            identity["lora"] = [[sha256_of(open_lora(file).path), weight] for file, weight in self.lora.items()]
        return identity


def local_mesh(rules: str = "dp") -> Mesh:
    """The devices of this process: along `data` for "dp", else along `fsdp`."""
    return meshes.make_mesh(*((-1, 1) if rules == "dp" else (1, -1)), devices=jax.local_devices())
