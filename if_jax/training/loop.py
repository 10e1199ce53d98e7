"""The training loop: one stage, any number of devices, resumed by running the same command again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from typing import Any

import jax
import numpy as np
from absl import logging
from clu import parameter_overview
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from if_jax.checkpoints import run
from if_jax.checkpoints.stages import Encoders
from if_jax.checkpoints.weights import Params
from if_jax.config import Recipe, for_compiling, recipe_to_dict
from if_jax.parallel import failures, hosts, rules, run_lock
from if_jax.parallel import mesh as meshes
from if_jax.tracking.goodput import Recorder
from if_jax.tracking.writer import MetricWriter
from if_jax.training import executable_cache, host_facts, optimizer, posthoc, sampling, setup, validation
from if_jax.training.metrics import Window, step_flops
from if_jax.training.resume import check_same_data, resume
from if_jax.training.step import Batch, TrainState, ema_name
from if_jax.training.warm_start import open_frozen_unet


def train(recipe: Recipe, workdir: str, began: float | None = None) -> None:
    """Trains until `recipe.steps`, writing checkpoints, metrics and sample grids below `workdir`.

    The same command after any interruption goes on from the newest checkpoint and repeats the same losses, bit for bit.

    Args:
      recipe: what is trained, on what, and for how long.
      workdir: folder of the run, a local path or gs://….
      began: when this process began to work on it (seconds since 1970), for the account of its time; None: now.

    Raises:
      ValueError: the recipe does not fit the devices, the data or the run already in `workdir`.
      FloatingPointError: updates can no longer be made.
      hosts.Terminated: this process was asked to end, and has saved its state.
    """
    with failures.propagated():
        _train(recipe, workdir, Recorder(began))


def _train(recipe: Recipe, workdir: str, recorder: Recorder) -> None:
    mesh = meshes.make_mesh(recipe.mesh.data, recipe.mesh.fsdp, recipe.mesh.tensor)
    recorder.note("initialized")
    rules.check_batch_size(recipe.batch_size // recipe.accumulate, mesh, rules.PRESETS[recipe.mesh.rules])
    encoders = setup.read_frozen(recipe)
    t5, clip = encoders.t5, encoders.clip.shapes if encoders.clip else None
    parts = setup.make_setup(recipe, t5.config if t5 else None, mesh, t5.tokenizer.vocab_size if t5 else 0, clip)
    metadata = {"recipe": recipe_to_dict(recipe), "text_encoder_sha256": encoders.sha256}
    base, known = open_frozen_unet(recipe)
    metadata |= known
    if jax.process_count() > 1:
        hosts.require_same_facts(host_facts.facts(recipe, workdir, metadata), recipe.hosts.start_seconds)
    recorder.note("prepared")
    with run_lock.locked(workdir) if jax.process_index() == 0 else nullcontext():
        _train_alone(parts, mesh, encoders, base, workdir, metadata, recorder)


def _train_alone(
    parts: setup.TrainingSetup,
    mesh: Mesh,
    encoders: Encoders,
    base: Params | None,
    workdir: str,
    metadata: dict[str, Any],
    recorder: Recorder,
) -> None:
    """Trains in a folder that no other run is at work in."""
    recipe, read = parts.recipe, setup.caption_reader(parts.recipe, encoders)
    start, window_rows = resume(workdir, metadata, recipe.hosts.start_seconds)
    if start >= recipe.steps:
        return
    recorder.note("checked", step=start)
    validation.check_source(recipe)
    source = setup.open_source(recipe)
    content = host_facts.data_facts(recipe, source)
    if jax.process_count() > 1:  # each host has indexed its own copy
        everything = content | host_facts.validation_facts(recipe)
        hosts.require_same_facts(everything, recipe.hosts.start_seconds, topic="data")
    metadata |= content
    check_same_data(workdir, metadata)
    sharding = rules.batch_sharding(mesh, parts.sharding_rules)
    part = rules.batch_part(sharding, recipe.batch_size)
    batches = setup.open_batches(parts, source, read, metadata["text_encoder_sha256"], start, part)
    with (
        recorder.into(workdir if jax.process_index() == 0 else None),
        jax.set_mesh(mesh),
        run.open_checkpoints(
            workdir, keep=recipe.keep_checkpoints, keep_every=recipe.keep_every, metadata=metadata
        ) as checkpoints,
        _open_snapshots(recipe, workdir, metadata) as snapshots,
        closing(MetricWriter(workdir, start, recipe.wandb, metadata["recipe"])) as writer,
        hosts.termination() as termination_requested,
        hosts.deadline(recipe.hosts.step_seconds) as heartbeat,
        _explained_errors(recipe),
    ):
        state, frozen, compiled = _start(parts, encoders, base, checkpoints, start, recorder)
        schedule = optimizer.learning_rate_schedule(recipe.optimizer, recipe.steps)
        window = Window(recipe, schedule, step_flops(recipe, parts.networks), window_rows)
        reporter = _Reporter(window, writer, recorder, start, recipe.steps)
        sample = sampling.make_sampler(recipe, parts.networks, read, frozen)
        validate = validation.make_validation(recipe, parts.networks, read, frozen, sharding)
        advance = lambda state, batch: compiled(state, frozen, batch)  # noqa: E731
        inputs = _on_devices(batches, setup.batch_rows(parts), sharding, part)
        keep = (checkpoints, snapshots)
        _loop(recipe, state, advance, inputs, reporter, keep, validate, sample, termination_requested, heartbeat)


def _start(
    parts: setup.TrainingSetup,
    encoders: Encoders,
    base: Params | None,
    checkpoints: run.RunCheckpoints,
    start: int,
    recorder: Recorder,
) -> tuple[TrainState, Params, Callable[..., tuple[TrainState, dict[str, jax.Array]]]]:
    """The state to go on from, the parameters that are not trained, and the compiled step."""
    recipe, abstract = parts.recipe, setup.abstract_state(parts)
    if jax.process_index() == 0:
        logging.info("\n%s", parameter_overview.get_parameter_overview(abstract.params, include_stats=False))
    recorder.note("prepared")
    state = checkpoints.restore(abstract, start) if start else setup.fresh_state(parts, abstract, encoders.t5)
    if int(state.step) != start:
        raise ValueError(
            f"checkpoint {start} holds the state of step {int(state.step)}: move it away, to go on before it"
        )
    recorder.note("restored" if start else "prepared")
    frozen = setup.place_frozen(parts, encoders, base)
    recorder.note("prepared")
    # A finished program: it cannot be compiled a second time, other shapes are an error.
    lower = partial(setup.lower_step, parts, abstract, frozen)
    compiled = executable_cache.compiled(lower, jax.sharding.get_mesh(), for_compiling(recipe), parts.networks)
    if jax.process_count() > 1:  # some collectives (gloo) wait half a minute for a process that still compiles
        hosts.exchange("compiled", {}, recipe.hosts.start_seconds, while_alive=True)
    recorder.note("compiled")
    return state, frozen, compiled


@contextmanager
def _explained_errors(recipe: Recipe) -> Iterator[None]:
    """Explains running out of device memory, while compiling (TPU) or running (GPU), by the recipe's keys.

    Of several processes all leave here, at once: closing the checkpoints would wait for the others.
    """
    try:
        yield
    except hosts.Terminated:
        raise
    except (Exception, KeyboardInterrupt) as error:
        failure: BaseException = error
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error).strip().splitlines()[0]:
            failure = ValueError(
                f"training does not fit into device memory (batch_size {recipe.batch_size}, accumulate "
                f"{recipe.accumulate}, remat {recipe.remat}, mesh rules {recipe.mesh.rules}): raise accumulate, set "
                "remat=blocks, or spread the state with mesh.fsdp and mesh.rules=fsdp"
            )
        if jax.process_count() > 1:
            failures.abort(failure)
        if failure is error:
            raise
        raise failure from None


class _Reporter:
    """Reports a step's metrics once the step after it is dispatched, so that the devices never wait for the host."""

    def __init__(self, window: Window, writer: MetricWriter, recorder: Recorder, start: int, steps: int) -> None:
        self.window, self.writer, self.recorder = window, writer, recorder
        hidden = jax.process_index() != 0
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=hidden, mininterval=2.0)
        self._pending: tuple[int, dict[str, Any], list[str]] | None = None

    def devices_are_idle(self) -> bool:
        """Whether the newest step is done."""
        return self._pending is None or self._pending[1]["loss"].is_ready()

    def add(self, step: int, metrics: dict[str, Any], replaced: list[str]) -> None:
        """Takes a step's metrics (device arrays) and pictures that had to be replaced; reports the step before."""
        self.flush()
        self._pending = (step, metrics, replaced)

    def flush(self) -> None:
        """Reports what is left to report, and waits for it."""
        if self._pending is None:
            return
        step, metrics, replaced = self._pending
        self._pending = None
        if replaced:
            self.writer.names(step, "replaced_pictures", replaced)
        summary = self.window.add(step, metrics, len(replaced))
        self.bar.update(1)
        self.recorder.stepped(step, due=bool(summary))
        if summary:
            self.writer.scalars(step, summary)
            postfix = {"loss": f"{summary['loss']:.4f}", "img_s": f"{summary['images_per_second']:.1f}"}
            self.bar.set_postfix(postfix | ({"skipped": summary["skipped"]} if summary["skipped"] else {}))


def _loop(
    recipe: Recipe,
    state: TrainState,
    advance: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]],
    batches: Iterator[tuple[Batch, float, list[str]]],
    reporter: _Reporter,
    keep: tuple[run.RunCheckpoints, run.RunCheckpoints | None],
    validate: Callable[[Params], dict[str, float]],
    sample: Callable[[Params], sampling.Sheet],
    termination_requested: Callable[[int], bool],
    heartbeat: Callable[[], None],
) -> None:
    """Order, which resuming relies on: step, metrics, checkpoint, validation, samples."""
    average, recorder, writer = ema_name(recipe.ema_decays[0]), reporter.recorder, reporter.writer
    checkpoints, snapshots = keep
    heartbeat()
    with reporter.bar:
        for step in range(int(state.step) + 1, recipe.steps + 1):
            batch, waited, replaced = next(batches)
            if reporter.devices_are_idle():  # else they are still busy with the step before
                recorder.waited(waited)
            with jax.transfer_guard("disallow"):  # nothing moves between host and devices unseen
                state, metrics = hosts.block_on_cpu(advance(state, batch))
            reporter.add(step, {**metrics, "input_wait": waited}, replaced)
            ending = termination_requested(step)
            last = step == recipe.steps
            if ending or last or step % recipe.checkpoint_every == 0:
                reporter.flush()
                with recorder.during("saved", step=step):
                    writer.flush()  # a run that resumes from here does not write these lines again
                    checkpoints.save(step, state, {"window": list(reporter.window.rows)})
                    if ending:
                        checkpoints.finish()
            if snapshots is not None and _is_due(recipe.posthoc_ema.every, step, recipe.steps):
                with recorder.during("saved"):
                    updates = int(np.asarray(state.guard.accepted))
                    snapshots.save(step, posthoc.snapshot(recipe, state), {"updates": updates})
            if _is_due(recipe.validation.every, step, recipe.steps):
                with recorder.during("watched"):
                    writer.scalars(step, validate(state.ema[average]))
                    writer.flush()
            if _is_due(recipe.sample.every, step, recipe.steps):
                with recorder.during("watched"):
                    writer.pictures(step, "samples", *sample(state.ema[average]))
                    writer.flush()
            if ending and not last:  # with all that was due at this step, which no later session will do
                raise hosts.Terminated(f"told to end: saved at step {step}, the same command goes on from there")
            heartbeat()
        with recorder.during("saved"):
            checkpoints.finish()
            if snapshots is not None:
                snapshots.finish()


@contextmanager
def _open_snapshots(recipe: Recipe, workdir: str, metadata: dict[str, Any]) -> Iterator[run.RunCheckpoints | None]:
    """Where the averages of `posthoc_ema` go; None where there are none."""
    if not recipe.posthoc_ema.lengths:
        yield None
        return
    place = posthoc.folder_of(workdir)
    if jax.process_index() == 0:
        run.set_aside_damaged(place)
    with run.open_checkpoints(place, metadata, keep=1, keep_every=1) as snapshots:
        yield snapshots


def _is_due(every: int, step: int, last: int) -> bool:
    return bool(every) and (step % every == 0 or step == last)


def _on_devices(
    batches: Iterator[dict[str, np.ndarray]], names: Iterable[str], sharding: NamedSharding, part: tuple[int, int]
) -> Iterator[tuple[Batch, float, list[str]]]:
    """Each batch on the mesh, the seconds the host took for it, and the pictures that it had to replace."""
    while True:
        began = time.perf_counter()
        host = next(batches)
        batch = {name: rules.place_part(sharding, host[name], part) for name in names}
        yield hosts.block_on_cpu(batch), time.perf_counter() - began, list(map(str, host.get("replaced", ())))
