"""The checkpoints of a run: state, EMA, step and recipe, written with Orbax while training goes on.

A checkpoint is complete or absent: Orbax writes beside and renames, and what a killed process left half-written is
cleared at the next start. The recipe travels in each checkpoint's metadata, so a run folder explains itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp


class RunCheckpoints:
    """Saves and restores one run's state; use through `open_checkpoints`."""

    def __init__(self, checkpointer: ocp.training.Checkpointer, metadata: dict[str, Any]) -> None:
        self._checkpointer = checkpointer
        self._metadata = metadata

    def latest(self) -> int | None:
        """The newest complete checkpoint's step, or None in a fresh run."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def restore(self, abstract_state: Any) -> Any:
        """Loads the newest checkpoint into the shapes, dtypes and shardings of `abstract_state`."""
        return self._checkpointer.load_checkpointables(None, {"state": abstract_state})["state"]

    def save(self, step: int, state: Any) -> None:
        """Starts writing a checkpoint (device memory is copied before this returns); a step already saved is kept."""
        if step != self.latest():
            self._checkpointer.save_checkpointables_async(step, {"state": state}, custom_metadata=self._metadata)


@contextmanager
def open_checkpoints(workdir: str, *, keep: int, metadata: dict[str, Any]) -> Iterator[RunCheckpoints]:
    """Opens `WORKDIR/checkpoints`, keeping the newest `keep`; pending writes are finished on the way out."""
    policies, preservation = ocp.training.save_decision_policies, ocp.training.preservation_policies
    with ocp.training.Checkpointer(
        _folder(workdir),
        save_decision_policy=policies.FixedIntervalPolicy(1),
        preservation_policy=preservation.LatestN(keep),
        cleanup_tmp_directories=True,
    ) as checkpointer:
        yield RunCheckpoints(checkpointer, metadata)


def read_latest(workdir: str) -> tuple[int, dict[str, Any]]:
    """Step and metadata (recipe, text encoder hash) of a run's newest checkpoint; (0, {}) where there is none yet."""
    if not _folder(workdir).exists():
        return 0, {}
    with ocp.training.Checkpointer(_folder(workdir)) as checkpointer:
        latest = checkpointer.latest
        if latest is None:
            return 0, {}
        return latest.step, dict(checkpointer.checkpointables_metadata(latest.step).custom_metadata or {})


def read_ema(workdir: str, decay: str = "") -> tuple[int, dict[str, Any], Any]:
    """The newest checkpoint's (step, metadata, EMA parameters as host arrays): what a release is made of.

    decay: which of the run's averages, the first one of its recipe unless given.

    Raises:
      FileNotFoundError: the folder holds no finished checkpoint.
      ValueError: the run keeps no such average.
    """
    folder = _folder(workdir)
    if not folder.exists():
        raise FileNotFoundError(f"no checkpoint under {workdir}: give the --workdir of a run that has saved one")
    with ocp.training.Checkpointer(folder) as checkpointer:
        latest = checkpointer.latest
        if latest is None:
            raise FileNotFoundError(f"no finished checkpoint under {workdir}: let the run save one first")
        info = checkpointer.checkpointables_metadata(latest.step)
        state = info.metadata["state"]
        averages = state["ema"] if isinstance(state, dict) else state.ema
        decay = decay or f"{info.custom_metadata['recipe']['ema_decays'][0]:g}"
        if decay not in averages:
            raise ValueError(f"{workdir} keeps no EMA of decay {decay}: choose one of {', '.join(averages)}")
        ema = averages[decay]
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), ema)
    context = ocp.Context()
    context.pytree_options.loading.partial_load = True
    with context:
        loaded = ocp.load(folder / str(latest.step), {"ema": {decay: abstract}}, checkpointable_name="state")
    return latest.step, dict(info.custom_metadata or {}), jax.device_get(loaded["ema"][decay])


def _folder(workdir: str) -> epath.Path:
    path = workdir if "://" in workdir else str(Path(workdir).absolute())
    return epath.Path(path) / "checkpoints"
