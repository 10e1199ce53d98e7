"""A run goes on with the data it was begun with, wherever they are, and with no other."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
import record_stores

from if_jax.checkpoints import run
from if_jax.config import Recipe, recipe_to_dict
from if_jax.training import host_facts, setup
from if_jax.training.resume import check_same_data, resume

BASE = Recipe()


def _metadata(source: object, sha256: str = "") -> tuple[Recipe, dict[str, Any]]:
    recipe = dataclasses.replace(BASE, data=dataclasses.replace(BASE.data, source=str(source), size=16))
    return recipe, {"recipe": recipe_to_dict(recipe), "text_encoder_sha256": sha256}


def _resume(workdir: Path, source: object) -> int:
    """What the training command does before it opens its batches."""
    recipe, metadata = _metadata(source)
    step, _ = resume(str(workdir), metadata)
    check_same_data(str(workdir), metadata | host_facts.data_facts(recipe, setup.open_source(recipe)))
    return step


def test_a_run_goes_on_with_the_same_data_under_another_path_and_with_no_other(tmp_path: Path) -> None:
    tars, workdir = record_stores.write_tars(tmp_path / "job1", 6, 2), tmp_path / "run"
    late = (tars / "00001.tar").rename(tmp_path / "late.tar")
    recipe, metadata = _metadata(tars)
    metadata |= host_facts.data_facts(recipe, setup.open_source(recipe))
    with run.open_checkpoints(str(workdir), metadata, keep=1) as saved:
        saved.save(2, {"x": jnp.ones(3)})
    assert _resume(workdir, tars) == 2
    moved = tars.rename(tmp_path / "job2")
    assert _resume(workdir, moved) == 2  # a scratch folder of another job
    late.rename(moved / "00001.tar")  # as img2dataset writes when it is run again for what failed
    with pytest.raises(
        ValueError, match=r"was trained on other data: data\.source was .*4 records.*is .*6 records"
    ) as e:
        _resume(workdir, moved)
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match=r"data\.source was .*is 'scenes' \(scenes, drawn\)"):
        _resume(workdir, "scenes")
