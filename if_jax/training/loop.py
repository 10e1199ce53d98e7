"""The training loop: one stage, any number of devices, resumed by running the same command again."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from clu import parameter_overview
from flax import linen as nn
from jax.sharding import Mesh
from tqdm import tqdm

from if_jax.checkpoints import release, run
from if_jax.checkpoints.stages import TextEncoder
from if_jax.checkpoints.weights import boxed_params, load_params
from if_jax.config import Recipe, for_compiling, recipe_to_dict
from if_jax.data import pipeline
from if_jax.models import presets
from if_jax.parallel import hosts, rules
from if_jax.parallel import mesh as meshes
from if_jax.text import tokens
from if_jax.tracking.goodput import Recorder
from if_jax.tracking.writer import MetricWriter
from if_jax.training import executable_cache, host_facts, objective, optimizer, sampling, validation
from if_jax.training.metrics import Window, step_flops
from if_jax.training.resume import resume
from if_jax.training.step import TrainState, ema_name, init_state, make_step
from if_jax.training.warm_start import start_from_release


@dataclasses.dataclass(frozen=True)
class Session:
    """What one call of `train` works with: the recipe's parts, opened and compiled."""

    recipe: Recipe
    step_fn: Callable[..., tuple[TrainState, dict]]
    frozen: Any  # parameters that are used but not trained
    batches: Iterator[dict[str, np.ndarray]]
    batch_sharding: jax.sharding.Sharding
    saved: run.RunCheckpoints
    writer: MetricWriter
    recorder: Recorder
    window: Window
    sampler: Callable[[Any], sampling.Sheet]
    validate: Callable[[Any], dict[str, float]]
    told_to_end: Callable[[int], bool]
    heartbeat: Callable[[], None]


def train(recipe: Recipe, workdir: str, began: float | None = None) -> None:
    """Trains until `recipe.steps`, writing checkpoints, metrics and sample grids below `workdir`.

    The same command after any interruption goes on from the newest checkpoint and repeats the same losses, bit for bit.
    began: when this process began to work on it (seconds since 1970), for the account of its time; now, unless given.

    Raises:
      ValueError: the recipe does not fit the devices, the data or the run already in `workdir`.
      FloatingPointError: updates can no longer be made.
    """
    recorder = Recorder(began)
    placed = rules.PRESETS[recipe.mesh.rules]
    mesh = meshes.make_mesh(recipe.mesh.data, recipe.mesh.fsdp, recipe.mesh.tensor)
    recorder.note("initialized")
    rules.check_batch_size(recipe.batch_size // recipe.accumulate, mesh, placed)
    text = _frozen_text(recipe)
    networks = objective.make_networks(recipe, text.config if text else None)
    tokenizer = text.tokenizer if text else tokens.load_tokenizer("bytes")
    metadata = {"recipe": recipe_to_dict(recipe), "text_encoder_sha256": text.sha256 if text else ""}
    if jax.process_count() > 1:
        hosts.preflight(host_facts.facts(recipe, workdir, metadata), recipe.hosts.start_seconds)
    recorder.note("prepared")
    start, begun = resume(workdir, metadata)
    if start >= recipe.steps:
        return
    recorder.note("checked", step=start)
    batches = _open_batches(recipe, tokenizer, metadata["text_encoder_sha256"], start)
    with (
        recorder.into(workdir if jax.process_index() == 0 else None),
        jax.set_mesh(mesh),
        run.open_checkpoints(
            workdir, keep=recipe.keep_checkpoints, keep_every=recipe.keep_every, metadata=metadata
        ) as saved,
        closing(MetricWriter(workdir, start, recipe.wandb, metadata["recipe"])) as writer,
        hosts.termination() as told_to_end,
        hosts.deadline(recipe.hosts.step_seconds) as heartbeat,
        _explained_errors(recipe),
    ):
        tx = optimizer.make_optimizer(recipe.optimizer, recipe.steps)
        abstract = abstract_state(recipe, networks, tx, mesh, placed)
        _log_parameters(abstract)
        recorder.note("prepared")
        state = saved.restore(abstract) if start else _fresh_state(recipe, networks, tx, abstract)
        recorder.note("restored" if start else "prepared")
        frozen = {"text_encoder": _place_text(recipe, networks, text, mesh, placed)} if text else {}
        batch_sharding = rules.batch_sharding(mesh, placed)
        schedule = optimizer.learning_rate_schedule(recipe.optimizer, recipe.steps)
        flops = step_flops(recipe, networks, tokens.TEXT_LENGTH)
        recorder.note("prepared")
        # A finished program: it cannot be compiled a second time, other shapes are an error.
        lower = partial(lower_step, recipe, networks, tx, abstract, frozen, mesh, placed)
        step_fn = executable_cache.compiled(lower, mesh, for_compiling(recipe), networks)
        if jax.process_count() > 1:  # some collectives (gloo) wait half a minute for a process that still compiles
            hosts.exchange("compiled", {}, recipe.hosts.start_seconds)
        recorder.note("compiled")
        session = Session(
            recipe=recipe,
            step_fn=step_fn,
            frozen=frozen,
            batches=batches,
            batch_sharding=batch_sharding,
            saved=saved,
            writer=writer,
            recorder=recorder,
            window=Window(recipe, schedule, flops, begun),
            sampler=sampling.make_sampler(recipe, networks, tokenizer, frozen),
            validate=validation.make_validation(recipe, networks, tokenizer, frozen, batch_sharding),
            told_to_end=told_to_end,
            heartbeat=heartbeat,
        )
        _loop(session, state)


@contextmanager
def _explained_errors(recipe: Recipe) -> Iterator[None]:
    """Out of device memory, while compiling (TPU) or running (GPU), is told in the recipe's words.

    With several processes any other error of the runtime means that one is lost: this one leaves too.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        first = str(error).strip().splitlines()[0]
        if "RESOURCE_EXHAUSTED" in first:
            raise ValueError(
                f"training does not fit into device memory (batch_size {recipe.batch_size}, accumulate "
                f"{recipe.accumulate}, remat {recipe.remat}, mesh rules {recipe.mesh.rules}): raise accumulate, set "
                "remat=blocks, or spread the state with mesh.fsdp and mesh.rules=fsdp"
            ) from None
        if jax.process_count() == 1:
            raise
        hosts.exit_process(f"another process of this run was lost ({first}): start all of them again", hosts.LOST)


def _loop(s: Session, state: TrainState) -> None:
    """Order, which resuming relies on: step, metrics, checkpoint, validation, samples.

    Metrics of step k are fetched after step k+1 has been dispatched, so the device never waits for the host.
    """
    recipe, start = s.recipe, int(state.step)
    average = ema_name(recipe.ema_decays[0])
    pending: tuple[int, dict] | None = None
    s.heartbeat()
    bar = tqdm(total=recipe.steps, initial=start, unit="step", disable=jax.process_index() != 0, mininterval=2.0)
    with bar:
        for step in range(start + 1, recipe.steps + 1):
            batch, waited = _next_batch(s)
            if pending is None or pending[1]["loss"].is_ready():  # else the devices are still busy with the step before
                s.recorder.waited(waited)
            with jax.transfer_guard("disallow"):  # nothing moves between host and devices unseen
                state, metrics = hosts.block_on_cpu(s.step_fn(state, s.frozen, batch))
            _report(s, pending, bar)
            pending = (step, {**metrics, "input_wait": waited})
            told = s.told_to_end(step)
            if told or step % recipe.checkpoint_every == 0 or step == recipe.steps:
                _report(s, pending, bar)
                pending = None
                with s.recorder.during("saved", step=step):
                    s.writer.flush()  # a run that resumes from here does not write these lines again
                    s.saved.save(step, state, {"window": list(s.window.rows)})
                    if told:
                        s.saved.finish()
            if told and step < recipe.steps:  # after the last one a run would be found finished, without its pictures
                raise hosts.Terminated(f"told to end: saved at step {step}, the same command goes on from there")
            if _due(recipe.validation.every, step, recipe.steps):
                with s.recorder.during("watched"):
                    s.writer.scalars(step, s.validate(state.ema[average]))
                    s.writer.flush()
            if _due(recipe.sample.every, step, recipe.steps):
                with s.recorder.during("watched"):
                    s.writer.pictures(step, "samples", *s.sampler(state.ema[average]))
                    s.writer.flush()
            s.heartbeat()
        with s.recorder.during("saved"):
            s.saved.finish()


def _next_batch(s: Session) -> tuple[dict[str, jax.Array], float]:
    """The next batch on its devices, and the seconds the host kept them waiting for it."""
    began = time.perf_counter()
    host = next(s.batches)
    batch = {
        name: jax.make_array_from_process_local_data(s.batch_sharding, host[name]) for name in batch_rows(s.recipe)
    }
    return hosts.block_on_cpu(batch), time.perf_counter() - began


def _report(s: Session, pending: tuple[int, dict] | None, bar: tqdm) -> None:
    if pending is None:
        return
    report = s.window.add(*pending)
    bar.update(1)
    s.recorder.stepped(pending[0], due=bool(report))
    if report:
        s.writer.scalars(pending[0], report)
        told = {"loss": f"{report['loss']:.4f}", "img_s": f"{report['images_per_second']:.1f}"}
        bar.set_postfix(told | ({"skipped": report["skipped"]} if report["skipped"] else {}))


def _due(every: int, step: int, last: int) -> bool:
    return bool(every) and (step % every == 0 or step == last)


def abstract_state(
    recipe: Recipe, networks: objective.Networks, tx: Any, mesh: Mesh, placed: rules.Rules
) -> TrainState:
    """Shapes, dtypes and places of the state, without making it; the mesh may be abstract too."""
    boxed = jax.eval_shape(partial(_init, recipe, networks, tx), jax.random.key(recipe.seed))
    return _placed(boxed, mesh, placed)


def abstract_text(recipe: Recipe, networks: objective.Networks, mesh: Mesh, placed: rules.Rules) -> Any:
    """Shapes and places of a frozen text encoder, in the compute precision, since nothing is ever added to it."""
    return _placed(boxed_params(networks.text_encoder.config), mesh, placed, recipe.compute_dtype)


def _placed(boxed: Any, mesh: Mesh, placed: rules.Rules, dtype: str | None = None) -> Any:
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=place),
        nn.meta.unbox(boxed),
        rules.state_shardings(boxed, mesh, placed),
    )


def _log_parameters(abstract: TrainState) -> None:
    if jax.process_index() == 0:
        logging.info("\n%s", parameter_overview.get_parameter_overview(abstract.params, include_stats=False))


def _fresh_state(recipe: Recipe, networks: objective.Networks, tx: Any, abstract: TrainState) -> TrainState:
    """Step 0, made in place on the mesh: random weights, or those of the release `init_from`."""
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    # It runs once: on a CPU optimising its machine code takes longer than all else about it.
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    make = jax.jit(
        lambda key: nn.meta.unbox(_init(recipe, networks, tx, key)),
        out_shardings=places,
        compiler_options=quick if jax.default_backend() == "cpu" else None,
    )
    key = jax.random.key(recipe.seed)
    if not recipe.init_from:
        return make(key)
    params = start_from_release(recipe, abstract.params, lambda: make(key).params)
    fill = partial(init_state, optimizer=tx, decays=recipe.ema_decays)
    return jax.jit(fill, out_shardings=places, donate_argnums=0)(params)


def _init(recipe: Recipe, networks: objective.Networks, tx: Any, key: jax.Array) -> TrainState:
    params = objective.init_params(networks, recipe, key, tokens.TEXT_LENGTH)
    return init_state(params, tx, recipe.ema_decays)


def lower_step(
    recipe: Recipe,
    networks: objective.Networks,
    tx: Any,
    abstract: TrainState,
    frozen: Any,
    mesh: Mesh,
    placed: rules.Rules,
) -> jax.stages.Lowered:
    """The step for a mesh, traced but not compiled; nothing is allocated."""
    state_places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    one, split = rules.replicated(mesh), rules.batch_sharding(mesh, placed)
    frozen_places = jax.tree.map(lambda leaf: leaf.sharding, frozen)
    step = make_step(
        objective.make_loss(networks, recipe),
        tx,
        recipe.ema_decays,
        recipe.seed + 1,
        recipe.guard,
        recipe.accumulate,
        lambda part: jax.lax.with_sharding_constraint(part, split),
    )
    batch = {
        name: jax.ShapeDtypeStruct((recipe.batch_size, *shape), dtype, sharding=split)
        for name, (shape, dtype) in batch_rows(recipe).items()
    }
    # Output shardings are pinned: left free, the compiler moves un-annotated kernels after the first step.
    jitted = jax.jit(
        step, donate_argnums=0, in_shardings=(state_places, frozen_places, split), out_shardings=(state_places, one)
    )
    return jitted.lower(abstract, frozen, batch)


def batch_rows(recipe: Recipe) -> dict[str, tuple[tuple[int, ...], Any]]:
    """What one row of a batch holds on the devices: shapes and dtypes."""
    side, length = recipe.data.size, tokens.TEXT_LENGTH
    image = {"image": ((side, side, 3), np.uint8)}
    if recipe.data.embeddings:
        return image | {"states": ((length, presets.UNETS[recipe.unet].encoder_hid_dim), jnp.bfloat16)}
    return image | {"ids": ((length,), np.int32), "mask": ((length,), np.int32)}


def _open_batches(
    recipe: Recipe, tokenizer: tokens.Tokenizer, encoder: str, start: int
) -> Iterator[dict[str, np.ndarray]]:
    return pipeline.batches(
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
        workers=recipe.data.workers,
        preparation=recipe.data.preparation,
        keep=recipe.data.keep,
        embeddings=recipe.data.embeddings,
        encoder=encoder,
    )


def _frozen_text(recipe: Recipe) -> TextEncoder | None:
    if not recipe.text_encoder_from:
        return None
    text = release.read_text_encoder(recipe.text_encoder_from, None)
    host_facts.check_text_width(recipe, text.config)
    return text


def _place_text(
    recipe: Recipe, networks: objective.Networks, text: TextEncoder, mesh: Mesh, placed: rules.Rules
) -> Any:
    """The frozen text encoder on the mesh, read tensor by tensor."""
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract_text(recipe, networks, mesh, placed))
    return load_params(text.params, recipe.compute_dtype, places)
