"""The order of the checks: what others rest on first, what takes longest last, other processes as early as may be."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

from if_jax.doctor import machine
from if_jax.doctor.findings import Finding, attempt

_PARTING = 10.0  # seconds for the processes to take leave of each other


def examine(
    read_recipe: Callable[[], Mapping[str, Any]] | None = None,
    *,
    workdir: str | None = None,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    wait: int = 60,
) -> Iterator[Finding]:
    """Yields the findings as they are made.

    read_recipe: gives the recipe as `config.to_recipe` takes it, or raises. workdir, coordinator, processes, process:
    as for training. wait: seconds for other processes, and for devices.
    """
    yield (versions := machine.versions())
    if versions.status == "fail":
        return  # importing jax may fail, and nothing it tells could be trusted
    yield (lock := machine.tpu_lock())
    from if_jax.config import to_recipe
    from if_jax.doctor import processes as others

    recipe = None
    if read_recipe:
        finding, recipe = attempt("recipe", "correct the recipe", lambda: ("", to_recipe(read_recipe())))
        yield finding if recipe is None else Finding("recipe", "pass", f"{recipe.stage}, {recipe.unet}")
    given = None if coordinator is None else (coordinator, processes, process)
    finding, place = attempt("coordinator", "give --coordinator", lambda: ("", others.find_place(given, wait)))
    if finding.status == "fail":
        yield finding
    together = place is not None and place[1] > 1
    if together:
        problem = lock.line() if lock.status == "fail" else ""
        finding, met = others.all_come(place, wait, problem)
        if met:
            finding, met = _join(finding, None if given is None else place, wait)
        yield finding
        together = met
    alone = place is None or place[1] == 1
    found = None
    if lock.status != "fail" and (alone or together):
        finding, found = machine.devices(wait)
        yield finding
    yield from _look_at_run(recipe, workdir, found, place[1:] if together else (1, 0), wait)


def leave(code: int) -> None:
    """Takes leave of the other processes; ends this one at once where something hangs that cannot be waited for."""
    if "jax" not in sys.modules:
        return
    import jax

    if jax.distributed.is_initialized():
        parting = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        parting.start()
        parting.join(_PARTING)
    else:
        parting = None
    if (parting and parting.is_alive()) or any(thread.name == machine.ASKING for thread in threading.enumerate()):
        sys.stdout.flush()
        os._exit(code)


def _join(finding: Finding, place: tuple[str, int, int] | None, wait: int) -> tuple[Finding, bool]:
    from if_jax.parallel import hosts

    def join() -> tuple[str, bool]:
        hosts.join(*(place or (None, None, None)), start_seconds=wait, heartbeat_seconds=wait)
        return finding.told, True

    joined, done = attempt("coordinator", "look at the other processes' reports", join)
    return joined, bool(done)


def _look_at_run(
    recipe: Any, workdir: str | None, devices: list[Any] | None, position: tuple[int, int], wait: int
) -> Iterator[Finding]:
    """What depends on recipe, folder and devices; at the end, with several processes, whether all agree."""
    from if_jax.doctor import processes as others
    from if_jax.doctor import storage

    count, index = position
    if workdir:
        yield (folder := storage.writable(workdir))
        if recipe and folder.status != "fail":
            yield storage.same_run(workdir, recipe)
    text, checkpoint = None, 0
    if recipe:
        text = yield from _look_at_material(recipe)
        checkpoint = yield from _look_at_fit(recipe, text, devices, count)
    if workdir:
        yield storage.disk_space(workdir, recipe if checkpoint else None, checkpoint)
    if count > 1:
        found = others.agreement(_facts(recipe, workdir, text, devices), wait)
        yield from found
        if workdir and not any("workdir" in finding.told and finding.status == "fail" for finding in found):
            yield others.shared_folder(workdir, index, wait)


def _look_at_material(recipe: Any) -> Generator[Finding, None, Any]:
    """The findings; returns the frozen text encoder, None where there is none."""
    from if_jax.doctor import input_checks

    text = None
    if recipe.text_encoder_from:
        finding, text = input_checks.text_encoder(recipe)
        yield finding
    if recipe.init_from:
        yield input_checks.initial_weights(recipe)
    yield input_checks.data_source("data", recipe.data.source, recipe, recipe.data.workers)
    if recipe.validation.every:
        yield input_checks.data_source("validation data", recipe.validation.source, recipe)
    if recipe.data.embeddings:
        yield input_checks.text_states(recipe, text)
    return text


def _look_at_fit(recipe: Any, text: Any, devices: list[Any] | None, count: int) -> Generator[Finding, None, int]:
    """The findings; returns the bytes of a checkpoint, 0 where they cannot be known."""
    from if_jax.doctor import fit

    if devices is None:
        return 0
    finding, mesh = fit.mesh(recipe)
    yield finding
    if mesh is None:
        return 0
    yield fit.batch(recipe, mesh, count)
    if recipe.text_encoder_from and text is None:
        return 0
    finding, checkpoint = fit.memory(recipe, text.config if text else None, mesh)
    yield finding
    return checkpoint


def _facts(recipe: Any, workdir: str | None, text: Any, devices: list[Any] | None) -> dict[str, Any]:
    """What all processes must have in common, as far as it is known here."""
    from if_jax.config import recipe_to_dict
    from if_jax.parallel import hosts
    from if_jax.training import host_facts

    found = {"versions": machine.versions().told}
    if devices is None:
        return found | {"devices": 0}
    if recipe is None:
        return found | {"code": hosts.code_hash(), "recipe": "none", "workdir": workdir}
    return (
        found
        | host_facts.facts(recipe, workdir or "", {"recipe": recipe_to_dict(recipe)})
        | {"text encoder": text.identity if text else ""}
    )
