"""Pictures that only seemed sound are replaced, counted and named, by a run that goes on as by one that never ended."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import record_stores
import tiny
import webdataset
from PIL import Image

from if_jax.config import DataConfig, OptimizerConfig, Recipe, SampleConfig
from if_jax.data import indexing
from if_jax.data.tars import Tar
from if_jax.models import presets
from if_jax.training import loop
from if_jax.training.metrics import Window

RECIPE = Recipe(
    unet="tiny-I",
    text_encoder="tiny",
    batch_size=8,
    steps=6,
    log_every=2,
    checkpoint_every=2,
    optimizer=OptimizerConfig(schedule="constant", learning_rate=3e-3, warmup_steps=1),
    sample=SampleConfig(every=0),
)
COUNT, BROKEN = 16, (2, 3, 11)


def _lines(workdir: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "loss", "grad_norm", "pictures_replaced", "replaced_pictures")
    return [{name: row[name] for name in names if name in row} for row in rows]


@pytest.mark.slow  # compiles a step
def test_a_run_counts_and_names_them_and_goes_on_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(presets.UNETS, "tiny-I", tiny.one_level(tiny.BASE))
    monkeypatch.setitem(presets.T5_ENCODERS, "tiny", tiny.TEXT)
    path = tmp_path / "pictures.tar"
    with webdataset.TarWriter(str(path)) as tar:
        for i in range(COUNT):
            noise = np.random.default_rng(i).integers(0, 256, (60, 60, 3), np.uint8)
            jpeg = record_stores.encoded(Image.fromarray(noise), "JPEG")
            jpeg = jpeg[: len(jpeg) // 2] if i in BROKEN else jpeg
            tar.write({"__key__": f"{i:04d}", "jpg": jpeg, "txt": f"number {i}"})
    indexing.index_store(Tar(path), check="headers")
    recipe = dataclasses.replace(RECIPE, data=DataConfig(source=str(path), size=8, threads=2))
    loop.train(recipe, str(tmp_path / "whole"))
    whole = _lines(tmp_path / "whole")
    named = [name for row in whole for name in row.get("replaced_pictures", ())]
    assert sorted(named) == sorted(3 * [f"{i:04d}" for i in BROKEN])  # three epochs
    assert sum(row.get("pictures_replaced", 0) for row in whole) == len(named)
    assert [row["step"] for row in whole if "loss" in row] == [2, 4, 6]
    loop.train(dataclasses.replace(recipe, steps=4), str(tmp_path / "parts"))
    loop.train(recipe, str(tmp_path / "parts"))
    assert _lines(tmp_path / "parts") == whole


def test_a_window_counts_them_even_in_steps_that_are_left_out() -> None:
    window = Window(dataclasses.replace(RECIPE, log_every=3), lambda updates: 1.0, flops=1e9)
    row = {"loss": 1.0, "grad_norm": 1.0, "skipped": 0, "skipped_in_a_row": 0, "input_wait": 0.0}
    row |= {"mse_sum_by_t": np.ones(4), "count_by_t": np.ones(4)}
    assert window.add(1, row, 2) is None and window.add(2, row) is None
    report = window.add(3, row | {"loss": np.nan}, 3)
    assert report is not None and report["pictures_replaced"] == 5
    assert [window.add(step, row) for step in (4, 5)] == [None, None]
    report = window.add(6, row)
    assert report is not None and "pictures_replaced" not in report
