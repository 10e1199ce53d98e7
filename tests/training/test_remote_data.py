"""A stage trained from a bucket is the stage trained from a disk, and either goes on where the other ended."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from pathlib import Path

import pytest
import record_stores
import remote_sources
import tiny

from if_jax.checkpoints.release import read_text_encoder, write_stage
from if_jax.checkpoints.stages import Encoders
from if_jax.config import DataConfig, OptimizerConfig, Recipe, SampleConfig
from if_jax.data import embed
from if_jax.data.preprocessing import Preparation
from if_jax.data.remote import RemoteSettings
from if_jax.data.sources import open_stored
from if_jax.models import presets
from if_jax.parallel import rules
from if_jax.training import loop

NO_CACHE = RemoteSettings(cache_size="0B")
RECIPE = Recipe(
    unet="tiny-I",
    text_encoder="tiny",
    batch_size=8,
    steps=4,
    log_every=1,
    checkpoint_every=2,
    optimizer=OptimizerConfig(schedule="constant", learning_rate=3e-3, warmup_steps=1),
    sample=SampleConfig(every=0),
)


def _train(
    workdir: Path, source: str, steps: int, states: str = "", encoder: str = "", settings: RemoteSettings = NO_CACHE
) -> list[tuple[float, ...]]:
    """The step, losses and gradient norm of every step."""
    data = DataConfig(source=source, size=8, threads=2, remote=settings, embeddings=states)
    loop.train(dataclasses.replace(RECIPE, steps=steps, data=data, text_encoder_from=encoder), str(workdir))
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [tuple(row[name] for name in ("step", "loss", "mse", "vb", "grad_norm")) for row in rows if "loss" in row]


@pytest.mark.parametrize("silence", [1.0, pytest.param(30.0, marks=pytest.mark.slow)])
def test_a_stage_trains_from_a_bucket_as_from_a_disk(
    silence: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request in ten is answered 503, and for a while none is."""
    monkeypatch.setitem(presets.UNETS, "tiny-I", tiny.one_level(tiny.BASE))
    monkeypatch.setitem(presets.T5_ENCODERS, "tiny", tiny.TEXT)
    tars = record_stores.write_tars(tmp_path / "tars", 20, 7)
    with remote_sources.served(tmp_path) as far:
        address = remote_sources.upload(far, tars, "shards")
        calls = itertools.count()
        silent = remote_sources.silent(silence, 25)
        far.trouble = lambda request: silent(request) or (503 if next(calls) % 10 == 0 else None)
        wanted = _train(tmp_path / "near", str(tars), 4)
        assert [row[0] for row in wanted] == [1, 2, 3, 4]
        began = time.monotonic()
        assert _train(tmp_path / "far", address, 2) == wanted[:2]
        assert time.monotonic() - began > silence
        assert _train(tmp_path / "far", str(tars), 4) == wanted  # goes on from a disk
        assert next(calls) > 30
        far.put("shards/00009.tar", far.objects["shards/00000.tar"][0])
        with pytest.raises(ValueError, match=r"was trained on other data: data\.source was .*20 records.*27 records"):
            _train(tmp_path / "far", f"{address}/*.tar", 6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prepared", "states"])
def test_what_comes_whole_trains_a_stage_as_from_a_disk(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An array_record data set, and kept text states beside it; 20 ms a request."""
    monkeypatch.setitem(presets.UNETS, "tiny-I", tiny.one_level(tiny.BASE))
    monkeypatch.setitem(presets.T5_ENCODERS, "tiny", tiny.TEXT)
    near = str(record_stores.write_prepared(tmp_path / "data", "coco", *record_stores.coco_like(20)))
    encoder, states = "", ""
    if kind == "states":
        encoder, states = str(tmp_path / "stage_I"), str(tmp_path / "states")
        write_stage(Path(encoder), tiny.on_one_level(tiny.stages()[0]))
        layout = {"mesh": embed.host_mesh(), "sharding_rules": rules.PRESETS["dp"], "batch_size": 8}
        text = read_text_encoder(encoder, None)
        embed.embed(open_stored(near), Encoders(text), states, form="exact", preparation=Preparation(), **layout)
    wanted = _train(tmp_path / "near", near, 4, states, encoder)
    with remote_sources.served(tmp_path) as far:
        far.delay = 0.02
        address = remote_sources.upload(far, Path(near), "data")
        kept = remote_sources.upload(far, Path(states), "states") if states else ""
        words = (kept, encoder, RemoteSettings(str(tmp_path / "kept"), "1GB"))
        assert _train(tmp_path / "far", address, 2, *words) == wanted[:2]
        assert _train(tmp_path / "far", near, 4, states, encoder) == wanted  # goes on from a disk
        assert any("/download/" in request and "array_record" in request for request in far.requests)
