"""The checkpoints of a run: state, EMA, step and recipe, written with Orbax while training goes on.

A checkpoint is complete or absent: on a disk Orbax writes beside and renames, in a bucket it adds `commit_success.txt`
last, and what a killed process left half-written is cleared at the next start. Once complete it is sealed with
checksums (`seal.py`), and one that is no longer what was written is set aside for the one before. The recipe travels in
each checkpoint's metadata, so a run folder explains itself.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from absl import logging
from etils import epath
from orbax.checkpoint import utils as orbax_utils
from orbax.checkpoint import v1 as ocp

from if_jax.checkpoints.run_state import check_fits
from if_jax.checkpoints.seal import METADATA, damage, seal

_MIN_SLICE = 1 << 20  # bytes of an array that devices holding it alike share to write; below, slicing costs more
FORMAT = 1  # of what a checkpoint holds; one with a higher number is refused, never set aside


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

    def restore(self, abstract_state: Any, step: int | None = None) -> Any:
        """Loads a checkpoint.

        Args:
          abstract_state: shapes, dtypes and shardings to load it into.
          step: of which step; None: the newest.

        Returns:
          The state.

        Raises:
          ValueError: it holds another state, or cannot be read.
        """
        step = self.latest() if step is None else step
        named = f"checkpoint {step} of {self._folder.parent}"
        stored = self._checkpointer.checkpointables_metadata(step).metadata.get("state")
        check_fits(named, stored, abstract_state)
        with _in_one_line(named):
            return self._checkpointer.load_checkpointables(step, {"state": abstract_state})["state"]

    def save(self, step: int, state: Any, more: dict[str, Any] | None = None) -> None:
        """Starts writing a checkpoint; device memory is copied before this returns.

        Args:
          step: its number; a step already saved is kept.
          state: what is saved.
          more: JSON values that join the metadata.

        Raises:
          OSError: the one before could not be written, as on a full disk.
        """
        if step in self._saved():
            return
        self.finish()
        metadata = {"format": FORMAT, "step": step} | self._metadata | (more or {})
        response = self._checkpointer.save_checkpointables_async(step, {"state": state}, custom_metadata=metadata)
        self._sealed = self._sealer.submit(self._seal, response, step)

    def _saved(self) -> set[int]:
        return {row.step for row in self._checkpointer.checkpoints}

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

    Args:
      workdir: the run's folder, on a disk or in a bucket.
      metadata: JSON values that every checkpoint carries: recipe, text encoder.
      keep: how many of the newest are kept.
      keep_every: those whose step is a multiple of it are kept as well, 0 = none.

    Yields:
      The open checkpoints.
    """
    policies, preservation = ocp.training.save_decision_policies, ocp.training.preservation_policies
    kept = [preservation.LatestN(keep), *([preservation.EveryNSteps(keep_every)] if keep_every else [])]
    context = ocp.Context()
    context.array_options.saving.min_slice_bytes_for_replica_parallel = _MIN_SLICE
    with (
        context,
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
    """Renames every newest checkpoint that is not what was written to STEP.damaged, until a sound one is the newest.

    Says so loudly. One process of a run does this, before any opens the folder.

    Args:
      workdir: the run's folder.

    Returns:
      The steps set aside, newest first.

    Raises:
      ValueError: none is sound (a run does not begin anew unasked), or the newest was written by a newer version;
        nothing is renamed.
      PermissionError: files may not be read.
    """
    folder, steps, problems = _folder(workdir), saved_steps(workdir), {}
    with _permitted(workdir):
        for step in steps:
            problem = _problem(folder, step)
            if problem is None:
                break
            problems[step] = problem
        if steps and len(problems) == len(steps):
            reasons = "; ".join(f"{step}: {problem}" for step, problem in problems.items())
            raise ValueError(f"no checkpoint of {workdir} is sound ({reasons}): put a copy back, or move {folder} away")
        for step, problem in problems.items():
            bad = folder / f"{step}.damaged"
            if bad.exists():
                bad.rmtree()
            (folder / str(step)).rename(bad)
            logging.warning("checkpoint %s of %s is damaged: %s; set aside as %s", step, workdir, problem, bad.name)
    return list(problems)


def read_latest(workdir: str) -> tuple[int, dict[str, Any]]:
    """Step and metadata (recipe, text encoder hash) of a run's newest checkpoint; (0, {}) where there is none yet."""
    steps = saved_steps(workdir)
    return (steps[0], _own_metadata(_folder(workdir) / str(steps[0]))) if steps else (0, {})


def metadata_of(workdir: str, step: int) -> dict[str, Any]:
    """Metadata of the checkpoint of a step."""
    return _own_metadata(_folder(workdir) / str(step))


def read_ema(workdir: str, decay: str = "") -> tuple[int, dict[str, Any], Any]:
    """Reads what a release is made of from a run's newest checkpoint.

    Args:
      workdir: the run's folder.
      decay: which of the run's averages, such as "0.9999"; "" is the first one of its recipe.

    Returns:
      Step, metadata (recipe, text encoder hash) and averaged parameters, as host arrays.

    Raises:
      FileNotFoundError: the folder holds no finished checkpoint.
      ValueError: the run keeps no such average, or its newest checkpoint is not what was written.
    """
    while True:
        steps = saved_steps(workdir)
        if not steps:
            raise FileNotFoundError(f"no checkpoint under {workdir}: give the --workdir of a run that has saved one")
        try:
            return read_average(workdir, steps[0], decay)
        except (ValueError, OSError):
            if saved_steps(workdir)[:1] == steps[:1]:
                raise
            # A run that goes on has saved another one meanwhile, and removed this one under our hands.


def read_average(workdir: str, step: int, decay: str) -> tuple[int, dict[str, Any], Any]:
    """The same from the checkpoint of a step.

    Args:
      workdir: the run's folder.
      step: of the checkpoint.
      decay: as for `read_ema`.
    """
    folder, named = _folder(workdir), f"checkpoint {step} of {workdir}"
    with _permitted(workdir):
        problem = _problem(folder, step)
    if problem:
        raise ValueError(f"{named} is damaged: {problem}; the training command goes on from the one before it")
    metadata = _own_metadata(folder / str(step))
    with ocp.training.Checkpointer(folder) as checkpointer, _in_one_line(named):
        state = checkpointer.checkpointables_metadata(step).metadata["state"]
    averages = state.get("ema") or {}
    decay = decay or f"{metadata['recipe']['ema_decays'][0]:g}"
    if decay not in averages:
        kept = f"choose one of {', '.join(averages)}" if averages else "it keeps none"
        raise ValueError(f"{named} has no EMA of decay {decay}: {kept}")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), averages[decay])
    context = ocp.Context()
    context.pytree_options.loading.partial_load = True
    with context, _in_one_line(named):
        loaded = ocp.load(folder / str(step), {"ema": {decay: abstract}}, checkpointable_name="state")
    return step, metadata, jax.device_get(loaded["ema"][decay])


def _folder(workdir: str) -> epath.Path:
    path = workdir if "://" in workdir else str(Path(workdir).absolute())
    return epath.Path(path) / "checkpoints"


def saved_steps(workdir: str) -> list[int]:
    """The committed checkpoints, newest first; everything else in the folder is left alone."""
    folder = _folder(workdir)
    if workdir.startswith("gs://"):  # gcsfs keeps what it has listed; the arguments are those of etils, which opens it
        import fsspec

        fsspec.filesystem("gcs", finalize_on_close=True).invalidate_cache()
    try:
        with _permitted(workdir):
            names = [path.name for path in folder.iterdir() if _is_committed(path)]
    except FileNotFoundError:
        return []
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        raise NotADirectoryError(f"{folder} is not a folder: move it away, or use another --workdir") from None
    return sorted(map(int, names), reverse=True)


def _is_committed(path: epath.Path) -> bool:
    """Whether a path is named like a checkpoint, and one that Orbax has finished writing: in a bucket it says when."""
    if not re.fullmatch(r"0|[1-9][0-9]*", path.name):
        return False
    return not path.is_dir() or orbax_utils.is_checkpoint_finalized(path)  # a file of that name is damage


def _problem(folder: epath.Path, step: int) -> str | None:
    """What is wrong with a checkpoint, in words, or None; ValueError for a sound one that a newer version wrote."""
    if problem := damage(folder / str(step)):
        return problem
    own = _own_metadata(folder / str(step))
    if not isinstance(own.get("recipe"), dict) or not isinstance(own.get("window", []), list):
        return "its metadata holds no recipe"
    held = json.loads((folder / str(step) / METADATA).read_text())["custom_metadata"].get("step", step)
    return None if held == step else f"it holds step {held}"


def _own_metadata(folder: epath.Path) -> dict[str, Any]:
    """What the run itself has written into a checkpoint's metadata, without format and step."""
    own = json.loads((folder / METADATA).read_text()).get("custom_metadata")
    own = dict(own) if isinstance(own, dict) else {}
    written = own.pop("format", FORMAT)
    if written != FORMAT:
        raise ValueError(
            f"{folder} is a checkpoint of format {written!r}, this if_jax reads {FORMAT}: use the version that wrote "
            "it, or another --workdir"
        )
    own.pop("step", None)
    return own


@contextmanager
def _in_one_line(named: str) -> Iterator[None]:
    """What Orbax and TensorStore say in pages is said in one line."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        first = " ".join(str(error).split())[:160]
        raise ValueError(
            f"{named} cannot be read ({first}…): move it away, and the run goes on from another"
        ) from error


@contextmanager
def _permitted(workdir: str) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise PermissionError(
            f"{error.filename or workdir}: no permission; train as the user who owns {workdir}, or change its mode"
        ) from None
