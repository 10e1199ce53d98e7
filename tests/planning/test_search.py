"""The search over meshes, parts of the batch and remat, on a cost table in place of the compiler."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import fake_figures
import pytest
import tiny

from if_jax.config import DataConfig, MeshConfig, Recipe
from if_jax.models import presets
from if_jax.planning import plan, search
from if_jax.planning.blocks import Block
from if_jax.planning.estimate import Case, blocks_of, with_keys
from if_jax.planning.memory import Kept, memory_of
from if_jax.planning.slices import parse_slice

RECIPE = Recipe(
    unet="tiny-plan",
    text_encoder_from="tiny",
    data=DataConfig(size=8),
    batch_size=512,
    accumulate=1,
    mesh=MeshConfig(fsdp=4, rules="fsdp"),
)


@pytest.fixture(scope="module", autouse=True)
def preset() -> Iterator[None]:
    """Recipes name their nets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.UNETS, "tiny-plan", tiny.BASE)
        yield


def _kept(size: int) -> Kept:
    """So much of a picture by the first block that computes residuals, a quarter of it where blocks run again."""

    def of_picture(block: Block) -> float:
        if block.kind != "residual" or block["resample"] != "down":  # there is one
            return 0.0
        return size / (4 if block.remat == "blocks" else 1)

    return of_picture


def _case(limit: int = 10**9) -> Case:
    """On 16 devices with so much memory."""
    slice_ = parse_slice("v5e-16")
    generation = dataclasses.replace(slice_.generation, hbm_bytes=limit)
    return Case(RECIPE, tiny.TEXT, dataclasses.replace(slice_, generation=generation))


def test_ways_divide_the_batch_and_the_devices() -> None:
    ways = list(search.ways_to_train(_case()))
    for own in ways:
        own.check()
        assert own.rows * own.ways * own.recipe.accumulate == RECIPE.batch_size
    assert {own.mesh.shape["fsdp"] for own in ways} == {1, 2, 4, 8, 16}
    assert {own.recipe.mesh.rules for own in ways if own.mesh.shape["fsdp"] == 1} == {"dp"}


def test_the_best_fits_and_blocks_are_compiled_once_for_all_meshes() -> None:
    asked: list[tuple[int, str]] = []

    def table(case: Case) -> Mapping[Block, Any]:
        asked.append((case.core_rows, case.recipe.remat))
        unet, text = blocks_of(case)
        return fake_figures.figures([*unet, *text], per_cycle=1.31)  # slow: else such small nets only exchange

    state = sum(memory_of(_case(), _kept(0)).kinds.values())
    case = _case(limit=2 * state + 8 * 10**6)
    kept = _kept(10**6)  # 8 pictures at a time fit, 16 do not, but where blocks are computed again
    candidates = search.search(case, table, kept)
    assert len(asked) == len(set(asked)) <= search.COMPILED
    assert all(own.memory.total <= search.ROOM * own.memory.limit for own in candidates)
    times = [own.time.step.middle for own in candidates]
    assert times == sorted(times)
    assert candidates[0].case.recipe.remat != "blocks"  # what fits without is faster


def test_what_fits_nowhere_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit v5e-16 in any mesh"):
        search.search(_case(limit=1000), lambda case: {}, _kept(10))


def test_words_take_the_recipe_to_what_was_planned() -> None:
    best = with_keys(_case(), mesh={"data": 2, "fsdp": 8, "rules": "fsdp"}, accumulate=4, remat="blocks")
    words = search.changed_words(RECIPE, best.recipe)
    assert words == ("--config.accumulate=4", "--config.remat=blocks", "--config.mesh.fsdp=8")  # data=-1 takes the rest


def test_parts_that_make_it_fit_come_in_eights_first() -> None:
    state = sum(memory_of(_case(), _kept(0)).kinds.values())
    case = _case(limit=state + 34 * 10**6)  # activations, and as much for the block at work
    parts = list(plan.fitting_parts(case, _kept(10**6)))
    assert [own.rows for own in parts] == [16, 8, 4, 2, 1]
    assert parts[0].recipe.accumulate == 2
