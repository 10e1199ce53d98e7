"""A run in one go and the same interrupted, whose sessions share one program: what resumes to the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from if_jax.config import Recipe, SampleConfig
from if_jax.training import executable_cache, loop, setup


def train_whole_and_in_parts(recipe: Recipe, folder: Path) -> list[Any]:
    """Trains into `whole`, and without samples into `parts`, interrupted after step 3.

    Returns:
      The frozen weights of the three sessions.
    """
    programs, frozen_trees, place_frozen, compile_step = [], [], setup.place_frozen, executable_cache.compiled

    def keep_frozen(*args: Any) -> Any:
        frozen_trees.append(place_frozen(*args))
        return frozen_trees[-1]

    def compiled_once(*args: Any) -> Any:
        programs.append(programs[0] if programs else compile_step(*args))
        return programs[-1]

    def interrupted(*args: Any) -> Any:
        def step(state: Any, frozen: Any, batch: Any) -> Any:
            if int(state.step) == 3:
                raise KeyboardInterrupt
            return programs[0](state, frozen, batch)

        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "place_frozen", keep_frozen)
        patch.setattr(executable_cache, "compiled", compiled_once)
        loop.train(recipe, str(folder / "whole"))
        quiet = replace(recipe, sample=SampleConfig(every=0))
        patch.setattr(executable_cache, "compiled", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.train(quiet, str(folder / "parts"))
        patch.setattr(executable_cache, "compiled", compiled_once)
        loop.train(quiet, str(folder / "parts"))
    return frozen_trees
