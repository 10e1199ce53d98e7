"""The average of any length that a run's snapshots make, and which length is best by the validation loss.

WORKDIR/ema/checkpoints/STEP   the averages of `posthoc_ema.lengths` at a step, kept for good
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from if_jax.checkpoints import run
from if_jax.checkpoints.weights import Params, load_params
from if_jax.config import Recipe
from if_jax.diffusion.power_average import Profile, factors
from if_jax.parallel import mesh as meshes
from if_jax.parallel import rules
from if_jax.training import setup
from if_jax.training.resume import stored_recipe
from if_jax.training.step import TrainState, length_name
from if_jax.training.validation import make_validation
from if_jax.training.warm_start import open_frozen_unet

SWEPT = (0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2)


class Reconstruction(NamedTuple):
    """An average that was not kept."""

    step: int  # it ends with
    metadata: dict[str, Any]  # of the snapshot there
    params: Params
    error: float  # how far its profile lies from that of its length, as a share of its norm


def folder_of(workdir: str) -> str:
    """Where a run keeps its snapshots."""
    return f"{workdir.rstrip('/')}/ema"


def snapshot(recipe: Recipe, state: TrainState) -> dict[str, Any]:
    """What is kept of a state: the averages of `posthoc_ema.lengths`, in `posthoc_ema.dtype`."""
    dtype = jnp.dtype(recipe.posthoc_ema.dtype)
    kept = {name: state.ema[name] for name in map(length_name, recipe.posthoc_ema.lengths)}
    return {"ema": kept if dtype == jnp.float32 else jax.tree.map(lambda leaf: leaf.astype(dtype), kept)}


def reconstruct(workdir: str, length: float) -> Reconstruction:
    """Makes the average of a length that ends with the newest snapshot. One snapshot at a time is in memory.

    Args:
      workdir: of a run with `posthoc_ema.lengths`.
      length: σ of the average, as a share of the run.

    Raises:
      FileNotFoundError: the run has kept no snapshots.
      ValueError: a length that cannot be; or a snapshot is not what was written.
    """
    place = folder_of(workdir)
    steps = run.saved_steps(place)
    if not steps:
        raise FileNotFoundError(
            f"no snapshots under {place}: set posthoc_ema.lengths, such as 0.05 and 0.1, before a run is begun"
        )
    _, metadata = run.read_latest(place)
    recipe = stored_recipe(workdir, metadata)
    rows = []
    for step in reversed(steps):
        updates = run.metadata_of(place, step)["updates"]
        rows += [(step, Profile(own, updates)) for own in recipe.posthoc_ema.lengths]
    weights, error = factors([profile for _, profile in rows], Profile(length, rows[-1][1].updates))
    total: Any = None
    for (step, profile), weight in zip(rows, weights, strict=True):
        _, _, params = run.read_average(place, step, length_name(profile.length))
        part = jax.tree.map(lambda leaf, w=weight: np.asarray(leaf, np.float64) * w, params)
        total = part if total is None else jax.tree.map(np.add, total, part)
    return Reconstruction(steps[0], metadata, jax.tree.map(np.float32, total), error)


def sweep(workdir: str, lengths: Sequence[float] = SWEPT, say: Callable[[str], Any] = print) -> list[dict[str, float]]:
    """Measures the validation loss of averages of several lengths, by the run's own `validation` section.

    Args:
      workdir: of a run with `posthoc_ema.lengths`.
      lengths: of the averages.
      say: is given a line for each.

    Returns:
      For each "length", "error" (see `Reconstruction`) and the losses by name; also in WORKDIR/ema/lengths.json.

    Raises:
      FileNotFoundError, ValueError: see `reconstruct`.
    """
    _, metadata = run.read_latest(folder_of(workdir))
    if not metadata:
        reconstruct(workdir, lengths[0])  # which says what is missing
    recipe = stored_recipe(workdir, metadata)
    encoders = setup.read_frozen(recipe)
    mesh = meshes.make_mesh(recipe.mesh.data, recipe.mesh.fsdp, recipe.mesh.tensor)
    t5, clip = encoders.t5, encoders.clip.shapes if encoders.clip else None
    parts = setup.make_setup(recipe, t5.config if t5 else None, mesh, t5.tokenizer.vocab_size if t5 else 0, clip)
    base = open_frozen_unet(recipe)[0]
    rows = []
    with jax.set_mesh(mesh):
        places = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract_state(parts).params)
        frozen = setup.place_frozen(parts, encoders, base)
        sharding = rules.batch_sharding(mesh, parts.sharding_rules)
        validate = make_validation(recipe, parts.networks, setup.caption_reader(recipe, encoders), frozen, sharding)
        for length in lengths:
            made = reconstruct(workdir, length)
            row = {"length": length, "error": made.error} | validate(load_params(made.params, "float32", places))
            rows.append(row)
            say(f"{length:6.3f}  {row['validation/mean']:.6f}  profile off by {made.error:.2%}")
    report = {"step": run.saved_steps(folder_of(workdir))[0], "lengths": rows}
    (epath.Path(folder_of(workdir)) / "lengths.json").write_text(json.dumps(report, indent=2) + "\n")
    return rows
