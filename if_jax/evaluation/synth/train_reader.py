"""Trains the reader on renders alone: python -m if_jax.evaluation.synth.train_reader --workdir runs/reader

Scenes are drawn once and corrupted anew each time (`corrupt`); no picture of any cascade is ever seen. The same command
goes on with a run that was interrupted, to the same weights; at the end it measures the reader on renders of other
seeds and writes `reader.safetensors`, half precision with these figures in its header, into the run's folder.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization
from flax.core import meta

from if_jax.checkpoints.files import atomic_file
from if_jax.evaluation.synth import reading
from if_jax.evaluation.synth.corruptions import corrupt, stretch
from if_jax.evaluation.synth.reader import CELLS, FIELDS, PIXELS, Grid, Reader, apply_reader
from if_jax.scenes import geometry, raycast, sampling, tasks
from if_jax.scenes.scene import COLOURS, SHAPES, Scene

SEED = 2_000_003  # of the training scenes; `measure` and the prompts use others
BATCH = 32
_RENDERED = 64  # pictures drawn at a time
_RATE = 2e-3
_WARM_UP, _DECAY = 100, 0.3  # steps, and the share of them over which the rate falls to zero


class ReaderTrainState(NamedTuple):
    """All that training goes on from."""

    params: Any
    average: Any  # of the parameters
    moments: Any  # the optimizer's state
    step: jax.Array  # () int32


def main() -> None:
    """Parses, trains, measures, writes."""
    parser = argparse.ArgumentParser(description="Trains the reader on renders alone.")
    parser.add_argument("--workdir", type=Path, default=Path("runs/reader"))
    parser.add_argument("--pictures", type=int, default=8_192, help="renders to train on, a multiple of 64")
    parser.add_argument("--steps", type=int, default=3_000)
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    average = train(args.workdir, args.steps, render(args.workdir, args.pictures))
    figures = reading.measure(average)
    print(json.dumps(figures, indent=1))
    recipe = {"pictures": args.pictures, "steps": args.steps, "batch": BATCH, "seed": SEED}
    reading.write_weights(args.workdir / "reader.safetensors", average, {"recipe": recipe, "measured": figures})


def render(workdir: Path, count: int) -> dict[str, np.ndarray]:
    """Draw the training pictures, or load those an earlier call kept.

    Args:
      workdir: where they are kept, 64 to a file.
      count: how many, rounded down to a multiple of 64.

    Returns:
      pictures (N, 64, 64, 3) uint8, and their `targets`.
    """
    from tqdm import tqdm

    parts = []
    for number in tqdm(range(count // _RENDERED), desc="render", unit="batch", mininterval=10):
        path = workdir / f"renders-{number:04d}.npz"
        if not path.exists():
            with atomic_file(path) as beside, beside.open("wb") as file:
                np.savez(file, **_rendered(number))
        with np.load(path) as kept:
            parts.append(dict(kept))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def train(workdir: Path, steps: int, renders: dict[str, np.ndarray], save_every: int = 100) -> Any:
    """Train the reader, going on from WORKDIR/state.msgpack where there is one.

    Args:
      workdir: where the state is kept.
      steps: updates in all.
      renders: as `render` gives them.
      save_every: updates between two writes of the state.

    Returns:
      The averaged parameters.
    """
    from tqdm import tqdm

    optimizer = _optimizer(steps)
    state = _start(optimizer)
    kept = workdir / "state.msgpack"
    if kept.exists():
        state = cast(ReaderTrainState, serialization.from_bytes(state, kept.read_bytes()))
    first = int(state.step)
    with tqdm(total=steps, initial=first, unit="step", mininterval=10) as bar:
        for step in range(first, steps):
            rows = np.random.default_rng((SEED, step)).choice(len(renders["valid"]), BATCH, replace=False)
            batch = {name: value[rows] for name, value in renders.items()}
            keys = jax.random.split(jax.random.key(SEED + step))
            pictures = batch.pop("pictures").astype(np.float32) / 127.5 - 1
            pictures, batch["place"] = stretch(keys[0], pictures, batch["place"], CELLS)
            pictures = corrupt(keys[1], pictures)
            state, loss = _train_step(state, pictures, batch, optimizer=optimizer)
            bar.update()
            if step % 20 == 19:
                bar.set_postfix(loss=f"{float(loss):.3f}")
            if step % save_every == save_every - 1 or step == steps - 1:
                with atomic_file(kept) as beside:
                    beside.write_bytes(serialization.to_bytes(state))
    return state.average


def _rendered(number: int) -> dict[str, Any]:
    """Batch `number`: 64 pictures and what is in them. Half are scenes, half tasks of either split."""
    half = _RENDERED // 2
    numbers = np.arange(half) + number * half
    plain = _mixed(sampling.sample_scenes(numbers, SEED), jax.random.key(number))
    of_tasks, _ = tasks.sample_tasks(numbers, SEED, number % 3 == 0)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), plain, of_tasks)
    return jax.tree.map(np.asarray, {"pictures": raycast.render_scenes(both, PIXELS)} | targets(both))


@jax.jit
def targets(batch: Scene) -> dict[str, jax.Array]:
    """The reader's targets: `valid` (B, 6), `place` (B, 6, 2) column and row in cells, and each of `FIELDS` (B, 6)."""
    x, y = batch.position[..., 0], batch.position[..., 1]
    seen = geometry.project(x, y, geometry.middle_heights(batch.size))
    place = jnp.stack(geometry.to_pixels(seen, CELLS), axis=-1)
    fields = {name: getattr(batch, name) for name in FIELDS}
    return {"valid": batch.valid, "place": place.clip(0, CELLS - 1e-3), **fields}


@jax.jit
def _mixed(batch: Scene, key: jax.Array) -> Scene:
    """In half of the scenes every object gets shape, colour and material of its own, as a wrong drawing may have."""
    keys = jax.random.split(key, 4)
    own = jax.random.uniform(keys[0], (batch.valid.shape[0], 1)) < 0.5
    shape = batch.valid.shape

    def draw(key: jax.Array, classes: int, old: jax.Array) -> jax.Array:
        return jnp.where(own, jax.random.randint(key, shape, 0, classes), old)

    return batch._replace(
        shape=draw(keys[1], len(SHAPES), batch.shape),
        colour=draw(keys[2], len(COLOURS), batch.colour),
        material=draw(keys[3], 2, batch.material),
    )


def _optimizer(steps: int) -> optax.GradientTransformation:
    """A rate that is constant but for its ends: how long a run will be may be decided while it runs."""
    falling = int(_DECAY * steps)
    parts = [optax.linear_schedule(0.0, _RATE, _WARM_UP), optax.linear_schedule(_RATE, 0.0, falling)]
    rate = optax.join_schedules([parts[0], optax.constant_schedule(_RATE), parts[1]], [_WARM_UP, steps - falling])
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.01))


def _start(optimizer: optax.GradientTransformation) -> ReaderTrainState:
    picture = jnp.zeros((1, PIXELS, PIXELS, 3))
    params = meta.unbox(jax.jit(Reader().init)(jax.random.key(SEED), picture)["params"])
    return ReaderTrainState(params, params, optimizer.init(params), jnp.zeros((), jnp.int32))


@partial(jax.jit, static_argnames="optimizer")
def _train_step(
    state: ReaderTrainState, x: jax.Array, wanted: dict[str, jax.Array], *, optimizer: optax.GradientTransformation
) -> tuple[ReaderTrainState, jax.Array]:
    loss, gradient = jax.value_and_grad(lambda p: _loss(apply_reader(p, x), wanted))(state.params)
    update, moments = optimizer.update(gradient, state.moments, state.params)
    params = optax.apply_updates(state.params, update)
    decay = jnp.minimum(0.995, (state.step + 1) / (state.step + 10))
    average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.average, params)
    return ReaderTrainState(params, average, moments, state.step + 1), loss


def _loss(output: Grid, wanted: dict[str, jax.Array]) -> jax.Array:
    """CenterNet's penalty-reduced focal loss of the middles, and place and fields where a middle is."""
    valid = wanted["valid"].astype(jnp.float32)  # (B, 6)
    cell = wanted["place"].astype(jnp.int32)  # (B, 6, 2) column, row
    count = valid.sum()
    axis = jnp.arange(CELLS)
    gap = jnp.square(axis[None, None, None] - cell[..., None])  # (B, 6, 2, 16)
    near = jnp.exp(-(gap[:, :, 1, :, None] + gap[:, :, 0, None, :]) / (2 * 0.8**2)) * valid[..., None, None]
    near = near.max(1)  # (B, 16, 16), 1 in the cell of a middle
    log_p, log_q = jax.nn.log_sigmoid(output.middle), jax.nn.log_sigmoid(-output.middle)
    hit = jnp.square(1 - jnp.exp(log_p)) * log_p
    miss = (1 - near) ** 4 * jnp.square(jnp.exp(log_p)) * log_q
    total = -jnp.where(near == 1, hit, miss).sum()

    def at_middles(values: jax.Array) -> jax.Array:
        return jax.vmap(lambda v, c: v[c[:, 1], c[:, 0]])(values, cell)  # (B, 6, C)

    total += (jnp.abs(at_middles(output.offset) - (wanted["place"] - cell)).sum(-1) * valid).sum()
    for name, logits in output.fields.items():
        total += (optax.softmax_cross_entropy_with_integer_labels(at_middles(logits), wanted[name]) * valid).sum()
    return total / count


if __name__ == "__main__":
    main()
