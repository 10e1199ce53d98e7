"""The training loop: one stage, any number of devices, resumed by running the same command again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import Any

import jax
import numpy as np
from absl import logging
from clu import parameter_overview
from flax import linen as nn
from jax.sharding import Mesh
from tqdm import tqdm

from if_jax.checkpoints import release, run
from if_jax.config import Recipe, differences, recipe_to_dict
from if_jax.data import pipeline
from if_jax.models import presets
from if_jax.parallel import mesh as meshes
from if_jax.parallel import rules
from if_jax.text import tokens
from if_jax.tracking.writer import MetricWriter
from if_jax.training import objective, optimizer, sampling
from if_jax.training.step import TrainState, init_state, make_step
from if_jax.training.warm_start import start_from_release


def train(recipe: Recipe, workdir: str) -> None:
    """Trains until `recipe.steps`, writing checkpoints, metrics and sample grids below `workdir`.

    The same command after any interruption goes on from the newest checkpoint and repeats the same losses, bit for bit.
    Order inside the loop, which resuming relies on: step, metrics, checkpoint, samples. Metrics of step k are fetched
    after step k+1 has been dispatched, so the device never waits for the host.

    Raises:
      ValueError: the recipe does not fit the devices, the data or the run already in `workdir`.
      FloatingPointError: the loss is no longer finite.
    """
    placed = rules.PRESETS[recipe.mesh.rules]
    mesh = meshes.make_mesh(recipe.mesh.data, recipe.mesh.fsdp, recipe.mesh.tensor)
    rules.check_batch_size(recipe.batch_size, mesh, placed)
    text = _frozen_text(recipe)
    networks = objective.make_networks(recipe, text.config if text else None)
    tokenizer = text.tokenizer if text else tokens.load_tokenizer("bytes")
    metadata = {"recipe": recipe_to_dict(recipe), "text_encoder_sha256": text.sha256 if text else ""}
    start = _start_step(workdir, metadata)
    batches = pipeline.batches(
        recipe.data.source,
        size=recipe.data.size,
        batch_size=recipe.batch_size,
        seed=recipe.data.seed,
        start_step=start,
        tokenize=tokenizer,
        caption_dropout=recipe.data.caption_dropout,
        shard_index=jax.process_index(),
        shard_count=jax.process_count(),
        threads=recipe.data.threads,
    )
    with (
        jax.set_mesh(mesh),
        run.open_checkpoints(workdir, keep=recipe.keep_checkpoints, metadata=metadata) as saved,
        closing(MetricWriter(workdir, start)) as writer,
    ):
        tx = optimizer.make_optimizer(recipe.optimizer, recipe.steps)
        abstract = _abstract_state(recipe, networks, tx, mesh, placed)
        state = saved.restore(abstract) if start else _fresh_state(recipe, networks, tx, abstract)
        frozen = jax.device_put({"text_encoder": text.params} if text else {}, rules.replicated(mesh))
        step_fn = _compile_step(recipe, networks, tx, abstract, mesh, placed)
        sampler = sampling.make_sampler(recipe, networks, tokenizer, frozen)
        _loop(recipe, state, frozen, batches, step_fn, saved, writer, sampler, rules.batch_sharding(mesh, placed))


def _loop(
    recipe: Recipe,
    state: TrainState,
    frozen: Any,
    batches: Iterator[dict[str, np.ndarray]],
    step_fn: Any,
    saved: run.RunCheckpoints,
    writer: MetricWriter,
    sampler: Any,
    sharding: Any,
) -> None:
    start = int(state.step)
    schedule = optimizer.learning_rate_schedule(recipe.optimizer, recipe.steps)
    window = _Window(recipe, writer, schedule)
    pending: tuple[int, dict] | None = None
    bar = tqdm(total=recipe.steps, initial=start, unit="step", disable=jax.process_index() != 0, mininterval=2.0)
    with bar:
        for step in range(start + 1, recipe.steps + 1):
            waited = time.perf_counter()
            host = next(batches)
            batch = {
                name: jax.make_array_from_process_local_data(sharding, host[name]) for name in ("image", "ids", "mask")
            }
            waited = time.perf_counter() - waited
            state, metrics = step_fn(state, frozen, batch)
            if pending:
                window.add(*pending, bar)
            pending = (step, {**metrics, "input_wait": waited})
            if step % recipe.checkpoint_every == 0 or step == recipe.steps:
                window.add(*pending, bar)
                pending = None
                saved.save(step, state)
            if recipe.sample.every and (step % recipe.sample.every == 0 or step == recipe.steps):
                writer.picture(step, "samples", sampler(state.ema))


class _Window:
    """Collects the metrics of `log_every` steps and writes their mean; stops at a loss that is not finite."""

    def __init__(self, recipe: Recipe, writer: MetricWriter, schedule: Any) -> None:
        self._recipe, self._writer, self._schedule = recipe, writer, schedule
        self._rows: list[dict[str, float]] = []
        self._since = time.perf_counter()

    def add(self, step: int, metrics: dict[str, Any], bar: tqdm) -> None:
        row = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not np.isfinite(row["loss"]):
            raise FloatingPointError(
                f"loss is {row['loss']} at step {step}: lower optimizer.learning_rate "
                f"({self._recipe.optimizer.learning_rate}) and start again in a new --workdir"
            )
        self._rows.append(row)
        bar.update(1)
        if step % self._recipe.log_every:
            return
        means = {name: float(np.mean([r[name] for r in self._rows])) for name in row}
        now = time.perf_counter()
        seconds = (now - self._since) / len(self._rows)
        means |= {"learning_rate": float(self._schedule(step - 1)), "step_seconds": seconds}
        means["images_per_second"] = self._recipe.batch_size / seconds
        means["input_wait_share"] = means.pop("input_wait") / seconds
        self._writer.scalars(step, means)
        bar.set_postfix(loss=f"{means['loss']:.4f}", img_s=f"{means['images_per_second']:.1f}")
        self._rows, self._since = [], now


def _abstract_state(
    recipe: Recipe, networks: objective.Networks, tx: Any, mesh: Mesh, placed: rules.Rules
) -> TrainState:
    """Shapes, dtypes and places of the state, without making it; the parameter table goes to the log."""
    boxed = jax.eval_shape(partial(_init, recipe, networks, tx), jax.random.key(recipe.seed))
    shardings = rules.state_shardings(boxed, mesh, placed)
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        nn.meta.unbox(boxed),
        shardings,
    )
    if jax.process_index() == 0:
        logging.info("\n%s", parameter_overview.get_parameter_overview(abstract.params, include_stats=False))
    return abstract


def _fresh_state(recipe: Recipe, networks: objective.Networks, tx: Any, abstract: TrainState) -> TrainState:
    """Step 0, made in place on the mesh: random weights, or those of the release `init_from`."""
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    make = jax.jit(lambda key: nn.meta.unbox(_init(recipe, networks, tx, key)), out_shardings=places)
    key = jax.random.key(recipe.seed)
    if not recipe.init_from:
        return make(key)
    params = start_from_release(recipe, abstract.params, lambda: make(key).params)
    return jax.jit(partial(init_state, optimizer=tx), out_shardings=places, donate_argnums=0)(params)


def _init(recipe: Recipe, networks: objective.Networks, tx: Any, key: jax.Array) -> TrainState:
    return init_state(objective.init_params(networks, recipe, key, tokens.TEXT_LENGTH), tx)


def _compile_step(
    recipe: Recipe, networks: objective.Networks, tx: Any, abstract: TrainState, mesh: Mesh, placed: Any
) -> Any:
    loss_fn = objective.make_loss(networks, recipe)
    state_places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    one = rules.replicated(mesh)
    # Output shardings are pinned: left free, the compiler moves un-annotated kernels after the first step.
    return jax.jit(
        make_step(loss_fn, tx, recipe.ema_decay, recipe.seed + 1),
        donate_argnums=0,
        in_shardings=(state_places, one, rules.batch_sharding(mesh, placed)),
        out_shardings=(state_places, one),
    )


def _frozen_text(recipe: Recipe) -> release.TextEncoder | None:
    if not recipe.text_encoder_from:
        return None
    text = release.read_text_encoder(recipe.text_encoder_from)
    wanted = presets.UNETS[recipe.unet].encoder_hid_dim
    if text.config.d_model != wanted:
        raise ValueError(
            f"text_encoder_from {recipe.text_encoder_from!r} makes states of width {text.config.d_model}, "
            f"{recipe.unet!r} reads {wanted}: name the release it goes with"
        )
    return text


def _start_step(workdir: str, metadata: dict[str, Any]) -> int:
    """The step to go on from. A work folder belongs to one recipe; only how long and how often may change."""
    step, before = run.read_latest(workdir)
    if not before:
        return 0
    free = (
        "steps",
        "log_every",
        "checkpoint_every",
        "keep_checkpoints",
        "sample.",
        "mesh.",
        "data.threads",
        "init_",
    )
    changed = {
        key: pair for key, pair in differences(before["recipe"], metadata["recipe"]).items() if not key.startswith(free)
    }
    if changed:
        told = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items())
        raise ValueError(f"{workdir} holds a run of another recipe ({told}): use another --workdir or the old values")
    if before["text_encoder_sha256"] != metadata["text_encoder_sha256"]:
        raise ValueError(
            f"{workdir} was trained with another text encoder than {metadata['recipe']['text_encoder_from']}"
        )
    return step
