"""The loop end to end on a tiny stage: it learns, resumes to the same bits, publishes, and refuses what cannot work."""

from __future__ import annotations

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest
import record_stores
import tiny
from click.testing import CliRunner

from if_jax import cli
from if_jax.checkpoints import release, run
from if_jax.config import DataConfig, OptimizerConfig, Recipe, SampleConfig, ValidationConfig, recipe_to_dict
from if_jax.models import presets
from if_jax.parallel import hosts
from if_jax.tracking import goodput
from if_jax.training import executable_cache, loop, publish, setup

RECIPE = Recipe(
    unet="tiny-I",
    text_encoder="tiny",
    batch_size=8,
    steps=6,
    log_every=2,
    checkpoint_every=2,
    ema_decays=(0.9, 0.5),
    data=DataConfig(size=8, threads=1),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
    sample=SampleConfig(every=0),
    validation=ValidationConfig(every=3, samples=8, batch_size=8, timesteps=(100, 900)),
)

UNWATCHED = dataclasses.replace(RECIPE, validation=ValidationConfig())


@pytest.fixture(scope="module", autouse=True)
def tiny_presets():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.UNETS, "tiny-I", tiny.one_level(tiny.BASE))
        patch.setitem(presets.UNETS, "tiny-II", tiny.one_level(tiny.SUPER_RESOLUTION))
        patch.setitem(presets.T5_ENCODERS, "tiny", tiny.TEXT)
        yield


def _metrics(workdir):
    """What must not depend on when a run was interrupted: the rows of training and of validation, without the times."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    timeless = ("step", "loss", "mse", "vb", "grad_norm", "learning_rate")
    return [{name: row[name] for name in row if name in timeless or name.startswith("validation")} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    loop.train(RECIPE, str(workdir))
    return workdir


def test_a_run_leaves_metrics_and_checkpoints(finished):
    rows = _metrics(finished)
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6]
    assert [row["step"] for row in rows if "validation/t900" in row] == [3, 6]
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    assert list((finished / "tensorboard").iterdir())
    step, metadata, ema = run.read_ema(str(finished))
    assert step == 6 and metadata["recipe"]["unet"] == "tiny-I"
    assert set(ema) == {"unet", "text_encoder"}
    assert sorted(path.name for path in (finished / "checkpoints").iterdir() if path.name.isdigit()) == ["4", "6"]


def test_a_run_accounts_for_its_time(finished):
    events = goodput.read_events(str(finished))
    first = [event["event"] for event in events[: [event["event"] for event in events].index("end") + 1]]
    assert first[:4] == ["start", "initialized", "prepared", "checked"]
    assert first.index("compiled") < first.index("steps") < first.index("saved") < first.index("watched")
    account = goodput.account(events)
    assert account.total == pytest.approx(account.productive + sum(account.badput.values())) and account.step == 6
    assert account.productive > 0 and account.saves == 3 and min(account.badput.values()) >= 0
    assert account.badput["program_startup"] > 0 and account.badput["wasted_progress_from_disruption"] == 0


def _train_until(monkeypatch, workdir, at, happens):
    """Trains, but something else happens first once `at` batches are done."""
    compiled = executable_cache.compiled

    def interrupted(*args):
        step = compiled(*args)

        def call(state, frozen, batch):
            if int(state.step) == at:
                happens()
            return step(state, frozen, batch)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(executable_cache, "compiled", interrupted)
        loop.train(RECIPE, str(workdir))


def _raise(error):
    raise error


def test_a_run_that_is_interrupted_resumes_to_the_same_bits(finished, tmp_path, monkeypatch):
    """Told to end within a window of the log, where a validation is due, and killed: once each, in one run."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(hosts.Terminated, match="told to end: saved at step 3"):
        _train_until(monkeypatch, tmp_path, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert signal.getsignal(signal.SIGTERM) == before
    assert run.read_latest(str(tmp_path))[0] == 3
    with pytest.raises(KeyboardInterrupt):
        _train_until(monkeypatch, tmp_path, 4, lambda: _raise(KeyboardInterrupt))
    assert _metrics(tmp_path)[-1]["step"] < 6
    _train_until(monkeypatch, tmp_path, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))  # the last step: it ends whole
    assert _metrics(tmp_path) == _metrics(finished)
    account = goodput.account(goodput.read_events(str(tmp_path)))
    assert (account.sessions, account.disruptions, account.step) == (3, 2, 6) and account.restart > 0
    for expected, actual in zip(
        *(jax.tree.leaves(run.read_ema(str(path))[2]) for path in (finished, tmp_path)), strict=True
    ):
        np.testing.assert_array_equal(expected, actual)


def test_out_of_memory_is_told_in_the_words_of_the_recipe():
    with pytest.raises(ValueError, match="does not fit into device memory") as caught, loop._explained_errors(RECIPE):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nallocating")
    assert "batch_size 8, accumulate 1" in str(caught.value) and "\n" not in str(caught.value)


def test_another_recipe_is_refused_in_the_same_folder(finished):
    with pytest.raises(ValueError, match=r"another recipe \(batch_size was 8, is 16\)"):
        loop.train(dataclasses.replace(RECIPE, batch_size=16), str(finished))
    loop.train(dataclasses.replace(RECIPE, log_every=1), str(finished))  # nothing left to do, and allowed


def test_super_resolution_trains_on_a_published_text_encoder(finished, tmp_path):
    publish.publish([str(finished)], str(tmp_path / "one"))
    recipe = dataclasses.replace(
        RECIPE,
        stage="super-resolution",
        unet="tiny-II",
        text_encoder_from=str(tmp_path / "one" / "stage_I"),
        steps=2,
        prediction="v",
        data=DataConfig(size=16, low_size=8, threads=1),
        sample=SampleConfig(every=2, prompts=("a", "b"), steps="2", guidance_scale=1.0),
    )
    loop.train(recipe, str(tmp_path / "II"))
    assert (tmp_path / "II" / "samples" / "samples-0000002.png").is_file()
    publish.publish([str(finished), str(tmp_path / "II")], str(tmp_path / "two"), noise_level=[7])
    stages, defaults = release.read_cascade(tmp_path / "two")
    assert [stage.kind for stage in stages] == ["base", "super-resolution"]
    trained = run.read_ema(str(finished))[2]
    jax.tree.map(np.testing.assert_array_equal, stages[0].unet_params, trained["unet"])
    jax.tree.map(np.testing.assert_array_equal, stages[0].text_params, trained["text_encoder"])
    assert (tmp_path / "two/README.md").read_text().startswith("---") and stages[0].notes["step"] == "6"
    assert defaults[1].noise_level == 7 and stages[1].scheduler.prediction_type == "v_prediction"


def test_tars_of_img2dataset_train_as_they_are(finished, tmp_path, monkeypatch):
    tars = record_stores.write_tars(tmp_path / "tars", 20, 7)  # uneven, by webdataset's own writer
    recipe = dataclasses.replace(UNWATCHED, data=dataclasses.replace(RECIPE.data, source=str(tars)))
    # The step is the same for other pictures: the program of the other run is taken.
    monkeypatch.setattr(setup, "lower_step", lambda *args: pytest.fail("compiled anew"))
    loop.train(recipe, str(tmp_path / "run"))
    rows = _metrics(tmp_path / "run")
    assert len(rows) == 3 and np.isfinite([row["loss"] for row in rows]).all()
    # Other pictures: seen in the gradient, since a net that starts at zero has the same first losses on any.
    assert rows[0]["grad_norm"] != _metrics(finished)[0]["grad_norm"]


@pytest.mark.slow  # two more trainings, each compiled for minutes of a busy core
def test_kept_embeddings_train_like_the_encoder_that_made_them(finished, tmp_path):
    publish.publish([str(finished)], str(tmp_path / "one"))
    tars = record_stores.write_tars(tmp_path / "tars", 20, 7)
    stage = str(tmp_path / "one" / "stage_I")
    data = dataclasses.replace(RECIPE.data, source=str(tars))
    online = dataclasses.replace(UNWATCHED, steps=4, text_encoder_from=stage, compute_dtype="bfloat16", data=data)
    config = tmp_path / "recipe.py"
    config.write_text(
        f"from ml_collections import ConfigDict\nget_config = lambda: ConfigDict({recipe_to_dict(online)})"
    )
    result = CliRunner().invoke(cli.main, ["embed", "--config", str(config), "--out", str(tmp_path / "kept")])
    assert result.exit_code == 0 and "21 captions, exact" in result.output, result.output
    kept = dataclasses.replace(online, data=dataclasses.replace(data, embeddings=str(tmp_path / "kept")))
    for name, recipe in (("online", online), ("kept", kept)):
        loop.train(recipe, str(tmp_path / name))
    pairs = zip(_metrics(tmp_path / "online"), _metrics(tmp_path / "kept"), strict=True)
    for a, b in pairs:
        assert all(abs(a[name] - b[name]) < 1e-3 * a[name] for name in ("loss", "grad_norm")), (a, b)
    publish.publish([str(tmp_path / "kept")], str(tmp_path / "two"))


def test_a_run_older_than_a_recipe_key_goes_on_with_its_default(finished, monkeypatch):
    read = run.read_latest

    def older(workdir):
        step, before = read(workdir)
        del before["recipe"]["pooled_dropout"]  # the losses follow from it: no session may change it
        return step, before

    monkeypatch.setattr(run, "read_latest", older)
    loop.train(RECIPE, str(finished))
    with pytest.raises(ValueError, match=r"another recipe \(pooled_dropout was 0.0, is 0.5\)"):
        loop.train(dataclasses.replace(RECIPE, pooled_dropout=0.5), str(finished))


def test_what_cannot_work_is_refused_before_anything_is_compiled(tmp_path):
    with pytest.raises(ValueError, match="mesh data=3"):
        loop.train(dataclasses.replace(RECIPE, mesh=dataclasses.replace(RECIPE.mesh, data=3)), str(tmp_path))
    with pytest.raises(ValueError, match="batch_size 6 does not divide over 8"):
        loop.train(dataclasses.replace(RECIPE, batch_size=6), str(tmp_path))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        data = dataclasses.replace(RECIPE.data, source=str(tmp_path / "nothing"))
        loop.train(dataclasses.replace(RECIPE, data=data), str(tmp_path / "run"))
    with pytest.raises(FileNotFoundError, match="no checkpoint under"):
        publish.publish([str(tmp_path / "nothing")], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
