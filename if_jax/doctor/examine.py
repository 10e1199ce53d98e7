"""The order of the checks: what others rest on first, what takes longest last, other processes as early as may be."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from if_jax.doctor import machine
from if_jax.doctor.findings import Finding, attempt

if TYPE_CHECKING:  # none of them before `machine.versions` has looked at jax
    from if_jax.config import Recipe
    from if_jax.doctor.input_checks import FrozenText
    from if_jax.parallel.rendezvous import Address

_SHUTDOWN_SECONDS = 10.0  # for the processes to disconnect from each other


def examine(
    read_recipe: Callable[[], Mapping[str, Any]] | None = None,
    *,
    workdir: str | None = None,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    wait: int = 60,
    data_only: bool = False,
) -> Iterator[Finding]:
    """Yields the findings as they are made.

    Args:
      read_recipe: reads the recipe as `config.to_recipe` takes it, or raises; None: the machine alone is looked at.
      workdir: as for training.
      coordinator: likewise.
      processes: likewise.
      process: likewise.
      wait: seconds for other processes, and for devices.
      data_only: look at what the recipe reads from buckets, and at nothing else: no device is touched.
    """
    if data_only:
        yield from _check_data_alone(read_recipe, (coordinator, processes, process), wait)
        return
    yield (versions := machine.versions())
    if versions.status == "fail":
        return  # importing jax may fail, and nothing it says could be trusted
    yield (lock := machine.tpu_lock())
    from if_jax.config import to_recipe
    from if_jax.doctor.processes import all_present
    from if_jax.parallel.rendezvous import resolve_address

    recipe = None
    if read_recipe:
        finding, recipe = attempt("recipe", "correct the recipe", lambda: ("", to_recipe(read_recipe())))
        yield finding if recipe is None else Finding("recipe", "pass", f"{recipe.stage}, {recipe.unet}")
    options = (coordinator, processes, process)
    finding, address = attempt("coordinator", "give --coordinator", lambda: ("", resolve_address(*options, wait)))
    if finding.status == "fail":
        yield finding
    joined = False
    if address is not None and address.processes > 1:
        finding, joined = all_present(address, wait, lock.line() if lock.status == "fail" else "")
        if joined:
            finding, joined = _join(finding, options, wait)
        yield finding
    alone = address is None or address.processes == 1
    devices = None
    if lock.status != "fail" and (alone or joined):
        finding, devices = machine.devices(wait)
        yield finding
    yield from _check_run(recipe, workdir, devices, address if joined else None, wait)


def disconnect(code: int) -> None:
    """Leaves the other processes; ends this one with `code` at once where something hangs that cannot be waited for."""
    if "jax" not in sys.modules:
        return
    import jax

    shutdown = None
    if jax.distributed.is_initialized():
        shutdown = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        shutdown.start()
        shutdown.join(_SHUTDOWN_SECONDS)
    query_hangs = any(thread.name == machine.DEVICE_QUERY for thread in threading.enumerate())
    if query_hangs or (shutdown and shutdown.is_alive()):
        sys.stdout.flush()
        os._exit(code)


def _check_data_alone(
    read_recipe: Callable[[], Mapping[str, Any]] | None, options: tuple[str | None, int | None, int | None], wait: int
) -> Iterator[Finding]:
    from if_jax.config import to_recipe
    from if_jax.doctor.data_access import remote_data
    from if_jax.parallel.rendezvous import resolve_address

    finding, recipe = attempt("recipe", "correct the recipe", lambda: ("", to_recipe((read_recipe or dict)())))
    if recipe is None:
        yield finding
        return
    _, address = attempt("coordinator", "", lambda: ("", resolve_address(*options, wait)))
    findings = list(remote_data(recipe, address.processes if address else 1))
    yield from findings or [Finding("data", "pass", f"{recipe.data.source}: not in a bucket")]


def _join(finding: Finding, options: tuple[str | None, int | None, int | None], wait: int) -> tuple[Finding, bool]:
    from if_jax.parallel import hosts

    join = partial(hosts.initialize_jax, *options, start_seconds=wait, heartbeat_seconds=wait)
    joined, _ = attempt("coordinator", "look at the other processes' reports", lambda: (finding.message, join()))
    return joined, joined.status == "pass"


def _check_run(
    recipe: Recipe | None, workdir: str | None, devices: list[Any] | None, address: Address | None, wait: int
) -> Iterator[Finding]:
    """What depends on recipe, folder and devices; at the end, with several processes, whether all agree."""
    from if_jax.doctor import processes, storage

    if workdir:
        yield (folder := storage.writable(workdir))
        if recipe and folder.status != "fail":
            yield storage.same_run(workdir, recipe)
    text, checkpoint = None, 0
    if recipe:
        text = yield from _check_inputs(recipe, address.processes if address else 1)
        checkpoint = yield from _check_fit(recipe, text, devices, address.processes if address else 1)
    if workdir:
        yield storage.disk_space(workdir, recipe if checkpoint else None, checkpoint)
    if address is not None:
        findings = processes.same_facts(_facts(recipe, workdir, text, devices), wait)
        yield from findings
        if workdir and not any("workdir" in finding.message and finding.status == "fail" for finding in findings):
            yield processes.shared_folder(workdir, address.process, wait)


def _check_inputs(recipe: Recipe, count: int) -> Generator[Finding, None, FrozenText | None]:
    """The findings; returns the frozen text encoder, None where there is none."""
    from if_jax.doctor import input_checks
    from if_jax.doctor.data_access import remote_data

    text = None
    if recipe.text_encoder_from or recipe.conditioning.clip_from:
        finding, text = input_checks.text_encoder(recipe)
        yield finding
    if recipe.init_from:
        yield input_checks.initial_weights(recipe)
    yield (source := input_checks.data_source("data", recipe.data.source, recipe, recipe.data.workers))
    if source.status != "fail":
        yield from remote_data(recipe, count)
    if recipe.validation.every:
        yield input_checks.data_source("validation data", recipe.validation.source, recipe)
    if recipe.data.embeddings:
        yield input_checks.text_states(recipe, text)
    return text


def _check_fit(
    recipe: Recipe, text: FrozenText | None, devices: list[Any] | None, count: int
) -> Generator[Finding, None, int]:
    """The findings; returns the bytes of a checkpoint, 0 where they cannot be known."""
    from if_jax.doctor import fit

    if devices is None:
        return 0
    finding, mesh = fit.mesh(recipe)
    yield finding
    if mesh is None:
        return 0
    yield fit.batch(recipe, mesh, count)
    if (recipe.text_encoder_from or recipe.conditioning.clip_from) and text is None:
        return 0
    finding, checkpoint = fit.memory(recipe, text.config if text else None, mesh, text.clip if text else None)
    yield finding
    return checkpoint


def _facts(
    recipe: Recipe | None, workdir: str | None, text: FrozenText | None, devices: list[Any] | None
) -> dict[str, Any]:
    """What all processes must have in common, as far as it is known here."""
    from if_jax.config import recipe_to_dict
    from if_jax.parallel import hosts
    from if_jax.training import host_facts

    facts: dict[str, Any] = {"versions": machine.versions().message}
    if devices is None:
        return facts | {"devices": 0}
    if recipe is None:
        return facts | {"code": hosts.code_hash(), "recipe": "none", "workdir": workdir}
    facts |= host_facts.facts(recipe, workdir or "", {"recipe": recipe_to_dict(recipe)})
    return facts | {"text encoder": text.identity if text else ""}
