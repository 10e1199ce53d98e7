"""The run folder: whether it can be written, whether it belongs to this recipe, and whether there is room."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from etils import epath

from if_jax.checkpoints import run
from if_jax.config import Recipe, recipe_to_dict
from if_jax.doctor.findings import Finding, attempt
from if_jax.training.resume import check_same_recipe

_LITTLE = 2_000_000_000  # bytes; below this even metrics, samples and compiled programs are at risk


def writable(workdir: str) -> Finding:
    """Writes, reads and removes a small file; a folder that is not there yet is not made."""

    def probe() -> tuple[str, None]:
        remote = "://" in workdir
        folder = epath.Path(workdir) if remote else epath.Path(nearest(workdir))
        file = folder / f".if_jax_doctor.{uuid.uuid4().hex}"
        try:
            file.write_text("here")
            if file.read_text() != "here":
                raise OSError(f"{file} does not hold what was written")
        finally:
            if remote or os.path.exists(file):
                file.unlink(missing_ok=True)
        return f"{workdir} can be written", None

    if workdir.startswith("gs://"):
        remedy = "check the bucket's name, and give this machine's service account Storage Object Admin"
        remedy += ' ("gcloud auth application-default login" on your own machine)'
    else:
        remedy = f"choose another --workdir, or: sudo chown -R $USER {workdir}"
    finding, _ = attempt("run folder", remedy, probe)
    if "gcsfs" in finding.message:
        return Finding("run folder", "fail", "gs:// paths need gcsfs, which is not installed", "pip install gcsfs")
    return finding


def same_run(workdir: str, recipe: Recipe) -> Finding:
    """What the run folder holds: nothing, or a run of this recipe."""

    def read() -> tuple[str, None]:
        step, before = run.read_latest(workdir)
        if not before:
            return "a new run", None
        check_same_recipe(workdir, before, recipe_to_dict(recipe))
        return f"goes on from step {step} of {recipe.steps}", None

    return attempt("run", "look into the folder, or use another --workdir", read)[0]


def disk_space(workdir: str, recipe: Recipe | None, state_bytes: int) -> Finding:
    """Whether there is room for the checkpoints that are kept, one being written before the oldest goes.

    Args:
      workdir: folder of the run, which need not be there yet.
      recipe: says how many are kept; None where nothing is known of them.
      state_bytes: of one checkpoint.
    """
    if "://" in workdir:
        return Finding("disk space", "pass", "not limited there")
    free = shutil.disk_usage(nearest(workdir)).free
    there = _checkpoints(Path(workdir))
    room = f"{free / 1e9:.1f} GB free"
    remedy = "free some, use another --workdir (gs:// works), or keep fewer with --config.keep_checkpoints"
    if recipe and free < state_bytes:
        return Finding("disk space", "fail", f"{room}, one checkpoint takes {state_bytes / 1e9:.1f} GB", remedy)
    wanted = state_bytes * max(1, recipe.keep_checkpoints + 1 - there) if recipe else 0
    if recipe and free < wanted:
        message = f"{room}, {recipe.keep_checkpoints} checkpoints and the one being written take {wanted / 1e9:.1f} GB"
        return Finding("disk space", "warn", message, remedy)
    if free < _LITTLE:
        return Finding("disk space", "warn", room, "free some, or use another --workdir")
    return Finding("disk space", "pass", room + (f", checkpoints will take {wanted / 1e9:.1f} GB" if wanted else ""))


def nearest(workdir: str) -> Path:
    """The folder, or the nearest one above it that is there."""
    path = Path(workdir).absolute()
    return next((each for each in (path, *path.parents) if each.exists()), Path("/"))


def _checkpoints(workdir: Path) -> int:
    folder = workdir / "checkpoints"
    return sum(path.name.isdigit() for path in folder.iterdir()) if folder.is_dir() else 0
