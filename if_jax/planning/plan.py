"""The plan of a recipe on a slice: placed, made to fit where the recipe as written does not, compiled, added up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from if_jax.checkpoints.files import parse_config, read_json
from if_jax.checkpoints.names import t5_config_from_hf
from if_jax.config import Recipe, for_compiling, recipe_to_dict
from if_jax.models import presets
from if_jax.models.t5 import T5Config
from if_jax.planning.blocks import Block
from if_jax.planning.compiling import (
    Figures,
    Progress,
    ask_alone,
    cache_folder,
    figures_of,
    keep,
    key_of,
    libtpu_version,
    read_cache,
)
from if_jax.planning.estimate import Case, blocks_of, step_time, with_keys
from if_jax.planning.memory import Kept, kept_of_picture, memory_of
from if_jax.planning.report import Plan
from if_jax.planning.search import COMPILED, search
from if_jax.training.host_facts import check_text_width

_WHOLE_SECONDS = 20.0  # of compiling the whole step for each distinct block of it, on two cores


def text_config(recipe: Recipe) -> T5Config | None:
    """The frozen text encoder's configuration, for which its weights need not be here.

    Args:
      recipe: whose `text_encoder_from` is a folder, or is named as one of the presets.

    Raises:
      FileNotFoundError, ValueError: neither, or it does not go with the UNet.
    """
    if not recipe.text_encoder_from:
        return None
    folder = Path(recipe.text_encoder_from)
    for inner in (folder / "text_encoder", folder):
        path = inner / "config.json"
        if path.is_file():
            config = parse_config(path, read_json(path), t5_config_from_hf)
            break
    else:
        config = presets.T5_ENCODERS.get(folder.name)
        if config is None:
            raise FileNotFoundError(
                f"text_encoder_from {recipe.text_encoder_from!r} is not here: copy its config.json there, or set "
                f"--config.text_encoder_from to the size it has: {', '.join(presets.T5_ENCODERS)}"
            )
    check_text_width(recipe, config)
    return config


def make_plan(
    case: Case,
    *,
    price: float | None = None,
    config: str = "RECIPE",
    progress: Progress | None = None,
    folder: Path | None = None,
    changes: tuple[str, ...] = (),
    whole: Callable[[Case], Figures] | None = None,
) -> Plan:
    """Plans a recipe on a slice, in more parts of the batch than it says where it would not fit as it is.

    Args:
      case: recipe and slice.
      price: of a chip for an hour.
      config: the recipe as the command line names it.
      progress: see `figures_of`.
      folder: of the cache; None: the user's.
      changes: `--config.KEY=VALUE` words that are in the recipe already.
      whole: compiles the whole step too, see `compile_whole_step`.

    Raises:
      ValueError: the recipe cannot be placed on the slice, or there is no TPU compiler.
    """
    libtpu = libtpu_version()
    case.check()
    note, memory = "", memory_of(case)
    if not memory.fits:
        rows, needs = case.rows, memory.total
        fitting = next(fitting_parts(case), None)
        why = f"{rows} picture(s) at a time would need {needs / 1e9:.0f} GB of a device"
        if fitting is None:
            note = f"{why}, and no accumulate makes it fit: use --search, more chips, or optimizer.name=adafactor"
            return Plan(case, memory, None, libtpu, 0.0, 0, price, config, changes, note)
        case, memory = fitting, memory_of(fitting)
        changes = (*changes, f"--config.accumulate={case.recipe.accumulate}")
        note = f"as written it does not fit: {why}. Planned with accumulate={case.recipe.accumulate} instead."
    if whole:
        memory = dataclasses.replace(memory, whole=_whole_bytes(whole(case)))
    unet, text = blocks_of(case)
    figures = figures_of([*unet, *text], case.slice.generation, folder or cache_folder(), progress)
    memory = dataclasses.replace(memory_of(case, figures=figures), whole=memory.whole)
    time = step_time(case, figures, memory.kinds)
    return Plan(case, memory, time, libtpu, compile_seconds(figures), len(figures), price, config, changes, note)


def search_plans(
    case: Case,
    tell: Callable[[int, int, Case], Progress],
    *,
    price: float | None = None,
    config: str = "RECIPE",
    words: tuple[str, ...] = (),
    folder: Path | None = None,
) -> list[Plan]:
    """Plans of all ways to train that a search has compiled, the fastest first.

    Args:
      case: recipe and slice.
      tell: the progress of one combination, by its number, how many there are, and a case of it.
      price: of a chip for an hour.
      config: the recipe as the command line names it.
      words: `--config.KEY=VALUE` words that are in the recipe already.
      folder: of the cache; None: the user's.

    Raises:
      ValueError: nothing fits, or there is no TPU compiler.
    """
    libtpu, compiled = libtpu_version(), []

    def compile_case(own: Case) -> Mapping[Block, Figures]:
        unet, text = blocks_of(own)
        progress = tell(len(compiled) + 1, COMPILED, own)
        compiled.append(figures_of([*unet, *text], own.slice.generation, folder or cache_folder(), progress))
        return compiled[-1]

    candidates = search(case, compile_case)
    seconds = sum(map(compile_seconds, compiled))
    blocks = len({block for figures in compiled for block in figures})
    return [
        Plan(own.case, own.memory, own.time, libtpu, seconds, blocks, price, config, (*words, *own.words(case.recipe)))
        for own in candidates
    ]


def compile_whole_step(case: Case, progress: Callable[[float, float], None], timeout: float = 7200.0) -> Figures:
    """What the compiler says of the whole step, see `compile_whole`; out of the cache, or by a child process.

    Args:
      case: what is planned.
      progress: called with the seconds that have passed and those that are left, by guess.
      timeout: seconds that it may take.
    """
    text = dataclasses.asdict(case.text) if case.text else None
    request = {"whole": recipe_to_dict(for_compiling(case.recipe)), "text": text}
    request |= {"slice": case.slice.name, "slices": case.slice.count}
    key, folder = key_of(request, case.slice.generation, libtpu_version()), cache_folder()
    if kept := read_cache(folder, key):
        return kept
    unet, encoder = blocks_of(case)
    expected = _WHOLE_SECONDS * (len(unet) + len(encoder))
    figures = ask_alone(request, lambda passed: progress(passed, max(expected - passed, 0.0)), timeout)
    keep(folder, key, figures)
    return figures


def _whole_bytes(figures: Figures) -> int:
    if "error" in figures:
        raise ValueError(f"the whole step could not be compiled ({figures['error']}): plan without --whole")
    return figures["bytes"]


def compile_seconds(figures: Mapping[Block, Figures]) -> float:
    """Seconds that compiling took, whenever that was."""
    return sum(own.get("seconds", 0.0) for own in figures.values())


def fitting_parts(case: Case, kept: Kept = kept_of_picture) -> Iterator[Case]:
    """The case in more and more parts of its batch, as far as they fit: multiples of 8 pictures first.

    Below 8 pictures the compiler folds the height of a picture into the batch, which costs up to half the speed.

    Args:
      case: which does not fit.
      kept: bytes that a block keeps of one picture.
    """
    batch, fitting = case.recipe.batch_size, []
    for parts in range(case.recipe.accumulate + 1, batch // case.ways + 1):
        if batch % (parts * case.ways) == 0:
            divided = with_keys(case, accumulate=parts)
            if memory_of(divided, kept).fits:
                fitting.append(divided)
    fitting.sort(key=lambda divided: (divided.rows % 8 != 0, -divided.rows))
    yield from fitting
