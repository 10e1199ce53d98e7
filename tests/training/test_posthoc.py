"""Power-function averages in training: by the step, kept as snapshots, made into a release, swept by validation."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from click.testing import CliRunner

from if_jax import cli
from if_jax.checkpoints import release, run
from if_jax.config import (
    DataConfig,
    OptimizerConfig,
    PosthocEmaConfig,
    Recipe,
    SampleConfig,
    ValidationConfig,
    to_recipe,
)
from if_jax.diffusion.power_average import exponent
from if_jax.training import loop, posthoc
from if_jax.training.step import init_state, length_name, make_step

LENGTHS = (0.05, 0.1)


def test_the_step_keeps_them_as_they_are_defined():
    def loss(params, frozen, batch, drawn):
        error = jnp.sum((params["w"] - batch["x"]) ** 2)
        return error, {"loss": error}

    optimizer = optax.sgd(0.1)
    step = jax.jit(make_step(loss, optimizer, (0.9,), 0, lengths=LENGTHS))
    state = init_state({"w": jnp.zeros(3)}, optimizer, (0.9,), LENGTHS)
    rng, walk = np.random.default_rng(0), []
    for _ in range(30):
        state, _ = step(state, {}, {"x": jnp.asarray(rng.normal(size=3), jnp.float32)})
        walk.append(np.asarray(state.params["w"], np.float64))
    t = np.arange(31)
    for length in LENGTHS:
        power = exponent(length) + 1
        want = ((t[1:] ** power - t[:-1] ** power) / 30**power) @ np.array(walk)
        np.testing.assert_allclose(state.ema[length_name(length)]["w"], want, atol=1e-6)


def test_a_single_length_is_refused():
    with pytest.raises(ValueError, match=r"posthoc_ema.lengths is \(0.05,\): .* at least two"):
        to_recipe({"posthoc_ema": {"lengths": [0.05]}})
    with pytest.raises(ValueError, match=r"posthoc_ema.lengths\[1\] is 0.4: it must be above 0 and at most 0.28|0.28"):
        to_recipe({"posthoc_ema": {"lengths": [0.05, 0.4]}})


def test_a_run_without_snapshots_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no snapshots under .*: set posthoc_ema\.lengths"):
        posthoc.reconstruct(str(tmp_path), 0.08)
    with pytest.raises(FileNotFoundError, match="no snapshots under"):
        posthoc.sweep(str(tmp_path))


@pytest.mark.slow
def test_a_run_keeps_snapshots_and_any_length_is_published(tmp_path):
    recipe = Recipe(
        unet="tiny-I",
        text_encoder="tiny",
        batch_size=8,
        steps=8,
        log_every=1,
        checkpoint_every=2,
        ema_decays=(0.9,),
        posthoc_ema=PosthocEmaConfig((*LENGTHS, 0.08), every=2),
        data=DataConfig(size=8, threads=0),
        optimizer=OptimizerConfig(schedule="constant", learning_rate=1e-2, warmup_steps=2),
        sample=SampleConfig(every=0),
        validation=ValidationConfig(samples=8, batch_size=8, timesteps=(100, 900)),
    )
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    with tiny.as_presets():
        loop.train(recipe, whole)
        loop.train(dataclasses.replace(recipe, steps=4), parts)
        loop.train(recipe, parts)
        assert run.saved_steps(posthoc.folder_of(whole)) == [8, 6, 4, 2]
        kept = []
        for name in map(length_name, (*LENGTHS, 0.08)):
            kept = [run.read_average(posthoc.folder_of(place), 8, name)[2] for place in (whole, parts)]
            assert jax.tree.all(jax.tree.map(np.array_equal, *kept))
        made, want = posthoc.reconstruct(whole, 0.08), kept[0]
        assert made.step == 8 and made.error < 1e-6
        for own, other in zip(jax.tree.leaves(made.params), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(own, other, atol=1e-5)
        result = CliRunner().invoke(cli.main, ["ema-sweep", whole, "--lengths", "0.05,0.12"])
        assert result.exit_code == 0, result.output
        rows = json.loads((tmp_path / "whole/ema/lengths.json").read_text())["lengths"]
        assert [row["length"] for row in rows] == [0.05, 0.12] and np.isfinite(rows[1]["validation/mean"])
        assert "least at 0." in result.output
        arguments = ["export", whole, str(tmp_path / "cascade"), "--ema-length", "0.12"]
        result = CliRunner().invoke(cli.main, arguments)
        assert result.exit_code == 0, result.output
        (stage,), _ = release.read_cascade(tmp_path / "cascade")
        assert stage.notes["ema_length"] == "0.12"
        for own, other in zip(
            jax.tree.leaves(stage.unet_params),
            jax.tree.leaves(posthoc.reconstruct(whole, 0.12).params["unet"]),
            strict=True,
        ):
            np.testing.assert_array_equal(own, other)
        result = CliRunner().invoke(cli.main, [*arguments, "--ema-decay", "0.9", "--overwrite"])
        assert result.exit_code == 1 and "name two averages" in result.output
        result = CliRunner().invoke(cli.main, ["ema-sweep", whole, "--lengths", "short"])
        assert result.exit_code == 1 and "give numbers joined by commas" in result.output
