"""The checkpoints of a run: state, EMA, step and recipe, written with Orbax while training goes on.

A checkpoint is complete or absent: Orbax writes beside and renames, and what a killed process left half-written is
cleared at the next start. Once complete it is sealed with checksums (`seal.py`), and one whose bytes have changed since
is set aside for the one before. The recipe travels in each checkpoint's metadata, so a run folder explains itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from absl import logging
from etils import epath
from orbax.checkpoint import v1 as ocp

from if_jax.checkpoints.seal import damage, seal


class RunCheckpoints:
    """Saves and restores one run's state; use through `open_checkpoints`."""

    def __init__(
        self,
        checkpointer: ocp.training.Checkpointer,
        sealer: ThreadPoolExecutor,
        folder: epath.Path,
        metadata: dict[str, Any],
    ) -> None:
        self._checkpointer, self._sealer, self._folder, self._metadata = checkpointer, sealer, folder, metadata
        self._sealed: Future | None = None  # of the newest save

    def latest(self) -> int | None:
        """The newest complete checkpoint's step, or None in a fresh run."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def restore(self, abstract_state: Any) -> Any:
        """Loads the newest checkpoint into the shapes, dtypes and shardings of `abstract_state`."""
        return self._checkpointer.load_checkpointables(None, {"state": abstract_state})["state"]

    def save(self, step: int, state: Any, more: dict[str, Any] | None = None) -> None:
        """Starts writing a checkpoint (device memory is copied before this returns); a step already saved is kept.

        more: JSON values that join the metadata.
        Raises OSError where the one before could not be written, as on a full disk.
        """
        if step == self.latest():
            return
        self.finish()
        metadata = self._metadata | (more or {})
        response = self._checkpointer.save_checkpointables_async(step, {"state": state}, custom_metadata=metadata)
        self._sealed = self._sealer.submit(self._seal, response, step)

    def finish(self) -> None:
        """Waits until what was saved is written and sealed."""
        if self._sealed is not None:
            self._sealed.result()

    def _seal(self, response: Any, step: int) -> None:
        response.result()
        if jax.process_index() == 0:
            seal(self._folder / str(step))


@contextmanager
def open_checkpoints(
    workdir: str, metadata: dict[str, Any], keep: int, keep_every: int = 0
) -> Iterator[RunCheckpoints]:
    """Opens `WORKDIR/checkpoints`; pending writes are finished on the way out.

    Kept are the newest `keep`, and all whose step is a multiple of `keep_every` (0 = none).
    """
    policies, preservation = ocp.training.save_decision_policies, ocp.training.preservation_policies
    kept = [preservation.LatestN(keep), *([preservation.EveryNSteps(keep_every)] if keep_every else [])]
    with (
        ThreadPoolExecutor(1) as sealer,
        ocp.training.Checkpointer(
            _folder(workdir),
            save_decision_policy=policies.FixedIntervalPolicy(1),
            preservation_policy=preservation.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
        ) as checkpointer,
    ):
        opened = RunCheckpoints(checkpointer, sealer, _folder(workdir), metadata)
        yield opened
        opened.finish()


def set_aside_damaged(workdir: str) -> list[int]:
    """Renames every newest checkpoint whose bytes have changed to STEP.damaged, until a sound one is the newest.

    Says so loudly; returns the steps set aside. One process of a run does this, before any opens the folder.
    """
    folder, aside = _folder(workdir), []
    if not folder.exists():
        return aside
    for step in sorted((int(path.name) for path in folder.iterdir() if path.name.isdigit()), reverse=True):
        problem = damage(folder / str(step))
        if problem is None:
            break
        bad = folder / f"{step}.damaged"
        if bad.exists():
            bad.rmtree()
        (folder / str(step)).rename(bad)
        logging.warning("checkpoint %s of %s is damaged: %s; set aside as %s", step, workdir, problem, bad.name)
        aside.append(step)
    return aside


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
      ValueError: the run keeps no such average, or the bytes of its newest checkpoint have changed.
    """
    folder = _folder(workdir)
    if not folder.exists():
        raise FileNotFoundError(f"no checkpoint under {workdir}: give the --workdir of a run that has saved one")
    with ocp.training.Checkpointer(folder) as checkpointer:
        latest = checkpointer.latest
        if latest is None:
            raise FileNotFoundError(f"no finished checkpoint under {workdir}: let the run save one first")
        if problem := damage(folder / str(latest.step)):
            raise ValueError(
                f"checkpoint {latest.step} of {workdir} is damaged: {problem}; the training command goes on from the "
                "one before it"
            )
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
