"""Training of a student beside its frozen teacher: it learns, resumes to the same bits, is released and refused."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import interrupted_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from if_jax.checkpoints import release, run
from if_jax.checkpoints.scheduler import SchedulerConfig
from if_jax.checkpoints.stages import StageRelease
from if_jax.config import (
    DataConfig,
    DistillConfig,
    MeshConfig,
    OptimizerConfig,
    Recipe,
    SampleConfig,
    recipe_to_dict,
    to_recipe,
)
from if_jax.diffusion import distillation, guidance, process
from if_jax.diffusion.schedule import cosine_schedule, parse_steps
from if_jax.models import presets
from if_jax.training import loop, memory, metrics, publish, resume, setup, warm_start

SPREAD = MeshConfig(data=2, fsdp=2, tensor=2, rules="fsdp_tp")


@pytest.fixture(scope="module", autouse=True)
def tiny_presets():
    with tiny.as_presets():
        yield


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of each kind, v and x0."""
    folder = tmp_path_factory.mktemp("release") / "cascade"
    release.write_cascade(folder, [teacher("v_prediction", 1.5), later_teacher()], tiny.DEFAULTS)
    return folder


def teacher(prediction: str, bound: float, seed: int = 0) -> StageRelease:
    base = tiny.on_one_level(tiny.stages()[0])
    params = tiny.random_params(base.unet_config, seed)
    scheduler = SchedulerConfig(bound, prediction_type=prediction)
    return dataclasses.replace(base, unet_params=params, scheduler=scheduler)


def later_teacher() -> StageRelease:
    """With notes, as a released run has them."""
    later = tiny.on_one_level(tiny.stages()[1])
    recipe = Recipe(
        stage="super-resolution",
        unet="tiny-II",
        text_encoder_from="x",
        prediction="x0",
        sample_max_value=1.0,
        bound_weight=0.0,
        data=DataConfig(size=16, low_size=8),
        sample=SampleConfig(steps="2", guidance_scale=1.0),
    )
    notes = {"recipe": json.dumps(recipe_to_dict(recipe)), "step": "7"}
    scheduler = SchedulerConfig(1.0, prediction_type="sample", variance_type="fixed_small")
    return dataclasses.replace(later, scheduler=scheduler, notes=notes)


def recipe_of(cascade: Path, **changes: Any) -> Recipe:
    recipe = Recipe(
        unet="tiny-I",
        text_encoder_from=str(cascade / "stage_I"),
        prediction="v",
        bound_weight=0.0,
        batch_size=8,
        steps=4,
        log_every=1,
        checkpoint_every=2,
        ema_decays=(0.5,),
        data=DataConfig(size=8, threads=1),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=1),
        mesh=SPREAD,
        sample=SampleConfig(every=4, prompts=("a red cube",)),
        distill=DistillConfig("consistency", str(cascade / "stage_I"), 3.0, 2, 5),
    )
    return to_recipe(recipe_to_dict(dataclasses.replace(recipe, **changes)))


def later_recipe(cascade: Path, **changes: Any) -> Recipe:
    own = DistillConfig("progressive", str(cascade), 1.0, 1, 2)  # the cascade: its stage of 16 px
    keys = {"stage": "super-resolution", "unet": "tiny-II", "prediction": "x0", "sample_max_value": 1.0}
    data = DataConfig(size=16, low_size=8, threads=1)
    return recipe_of(cascade, **keys, data=data, distill=own, sample=SampleConfig(every=0), **changes)


def losses(workdir: Path) -> list[float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def begun(cascade: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint of step 4, as training leaves it."""
    recipe, folder = recipe_of(cascade), tmp_path_factory.mktemp("begun")
    text = release.read_text_encoder(cascade)
    metadata = {"recipe": recipe_to_dict(recipe), "text_encoder_sha256": text.sha256}
    metadata |= warm_start.open_frozen_unet(recipe)[1]
    params = tiny.random_params(tiny.one_level(tiny.BASE), seed=5)
    with run.open_checkpoints(str(folder), metadata, keep=1) as saved:
        saved.save(4, {"ema": {"0.5": {"unet": jax.tree.map(jnp.asarray, params)}}})
    return folder


@pytest.mark.slow  # a minute of a core
def test_an_interrupted_run_resumes_to_the_same_bits(cascade: Path, tmp_path: Path) -> None:
    """On eight devices under fsdp_tp; the teacher keeps every bit, the student starts as it and moves away.

    One run in one go, and one interrupted after step 3, so from the checkpoint of step 2; one program for all.
    """
    frozen_trees = interrupted_runs.train_whole_and_in_parts(recipe_of(cascade), tmp_path)
    params = release.read_stage(cascade / "stage_I").unet_params
    for frozen in frozen_trees:
        jax.tree.map(np.testing.assert_array_equal, frozen["teacher"], params)
        assert frozen["empty"].shape == (1, 77, 32) and frozen.keys() == {"text_encoder", "teacher", "empty"}
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 4
    step, metadata, ema = run.read_ema(str(tmp_path / "whole"))
    jax.tree.map(np.testing.assert_array_equal, ema, run.read_ema(str(tmp_path / "parts"))[2])
    assert step == 4 and metadata["teacher_sha256"] and set(ema) == {"unet"}
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), ema["unet"], teacher("v_prediction", 1.5).unet_params)
    assert 0 < max(jax.tree.leaves(moved)) < 0.02
    assert list((tmp_path / "whole/samples").rglob("*.png"))


@pytest.mark.parametrize("method", ["progressive", "consistency"])
def test_the_loss_is_that_of_the_guided_and_thresholded_teacher(cascade: Path, method: Any) -> None:
    """Against the networks called one by one, as DDIM steps of the sampler: a student with weights of its own."""
    own = recipe_of(cascade, distill=DistillConfig(method, str(cascade), 3.0, 2, 2), mesh=MeshConfig(data=1))
    parts = setup.make_setup(own, tiny.TEXT, jax.sharding.AbstractMesh((1, 1, 1), ("data", "fsdp", "tensor")))
    networks, base = parts.networks, teacher("v_prediction", 1.5)
    student = tiny.random_params(base.unet_config, seed=5)
    rng = np.random.default_rng(0)
    states, empty = (rng.normal(size=(rows, 77, 32)).astype(np.float32) for rows in (3, 1))
    drawn = {"t": jnp.array([999, 499, 499]), "eps": jnp.asarray(rng.normal(size=(3, 8, 8, 3)), jnp.float32)}
    batch = {"image": jnp.asarray(rng.integers(0, 255, (3, 8, 8, 3)), jnp.uint8), "states": jnp.asarray(states)}
    frozen = {"text_encoder": base.text_params, "teacher": base.unet_params, "empty": jnp.asarray(empty)}
    loss, metrics = jax.jit(setup.make_loss(parts))({"unet": student}, frozen, batch, drawn)

    predict = jax.jit(networks.predict)
    schedule = cosine_schedule()

    def x0_of(params: Any, x: jax.Array, t: jax.Array, scale: float) -> jax.Array:
        cond, uncond = (
            predict(params, x, t, jnp.broadcast_to(text, states.shape))[..., :3] for text in (states, empty)
        )
        return process.x0_from_v(schedule, x, t, uncond + scale * (cond - uncond))

    t, x_t = drawn["t"], process.add_noise(schedule, batch["image"] / 127.5 - 1.0, drawn["t"], drawn["eps"])
    x = distillation.jump(schedule, x_t, t, t - 250, guidance.dynamic_threshold(x0_of(base.unet_params, x_t, t, 3.0)))
    second = (base.unet_params, 3.0) if method == "progressive" else (student, 1.0)
    believed = guidance.dynamic_threshold(x0_of(second[0], x, t - 250, second[1]))
    landed = distillation.jump(schedule, x, t - 250, t - 500, believed)
    wanted = distillation.belief_of_jump(schedule, x_t, t, t - 500, landed)
    expected = distillation.distillation_loss(schedule, x0_of(student, x_t, t, 1.0), wanted, t)["loss"].mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    assert metrics["count_by_t"].tolist() == [0, 2, 0, 1] and loss > 1e-3


def test_a_student_is_released_as_it_was_taught(cascade: Path, begun: Path, tmp_path: Path) -> None:
    """Beside a stage that was released before, which is taken as it is."""
    publish.publish([str(begun), str(cascade / "stage_II")], str(tmp_path / "fast"))
    stages, defaults = release.read_cascade(tmp_path / "fast")
    assert stages[0].scheduler == SchedulerConfig(
        1.5, prediction_type="v_prediction", variance_type="fixed_small", timestep_spacing="trailing", sampler="ddim"
    )
    assert parse_steps(defaults[0].sample_timestep_respacing).tolist() == [499, 999]
    assert defaults[0].guidance_scale == 1 and defaults[1].sample_timestep_respacing == "2"
    jax.tree.map(np.testing.assert_array_equal, stages[1].unet_params, later_teacher().unet_params)
    _, identity = warm_start.open_teacher(recipe_of(cascade))
    assert stages[0].notes["teacher_sha256"] == identity
    card = (tmp_path / "fast/README.md").read_text()
    assert f"taught by `{cascade / 'stage_I'}`" in card and identity in card and "7 steps" in card
    assert 'stage_I("a prompt", output_type="pt", guidance_scale=1.0, num_inference_steps=2)' in card
    with pytest.raises(ValueError, match="does not say by which recipe it was trained"):
        publish.publish([str(cascade / "stage_I")], str(tmp_path / "no"))


def test_another_teacher_is_refused_when_a_run_goes_on(cascade: Path, begun: Path, tmp_path: Path) -> None:
    """A teacher that has moved is not another one."""
    release.write_stage(tmp_path / "other", teacher("v_prediction", 1.5, seed=3))
    release.write_stage(tmp_path / "moved", release.read_stage(cascade / "stage_I"))
    text = run.read_latest(str(begun))[1]["text_encoder_sha256"]

    def go_on(folder: Path) -> int:
        recipe = recipe_of(cascade, distill=DistillConfig("consistency", str(folder), 3.0, 2, 5))
        metadata = {"recipe": recipe_to_dict(recipe), "text_encoder_sha256": text}
        return resume.resume(str(begun), metadata | warm_start.open_frozen_unet(recipe)[1])[0]

    assert go_on(tmp_path / "moved") == 4
    with pytest.raises(ValueError, match=r"holds the student of another teacher than distill\.teacher '.*other'") as e:
        go_on(tmp_path / "other")
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match=r"run of another recipe \(distill\.guidance_scale was 3\.0, is 2\.0\)"):
        loop.train(
            recipe_of(cascade, distill=DistillConfig("consistency", str(cascade / "stage_I"), 2.0, 2, 5)),
            str(begun),
        )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"distill.method": "consistency"}, r"distill\.teacher is empty, with distill\.method 'consistency'"),
        ({"distill.steps": 3}, r"distill\.steps is 3 without distill\.method: set progressive or consistency"),
        ({"distill.method": "dmd"}, r"distill\.method is 'dmd': it must be one of , progressive, consistency"),
        ({"on": 1, "distill.steps": 3}, r"distill\.steps is 3 and distill\.substeps 2: 3 × 2 jumps do not divide"),
        ({"on": 1, "prediction": "eps"}, r"prediction is 'eps', with distill\.method .*prediction=v and init_only=\."),
        ({"on": 1, "text_encoder_from": ""}, r"text_encoder_from is empty, .*reads, such as x"),
        ({"on": 1, "bound_weight": 1.0}, r"bound_weight is 1\.0, .*set bound_weight=0"),
        ({"on": 1, "loss_weight": "min-snr"}, r"loss_weight is 'min-snr', .*set loss_weight=none"),
        ({"on": 1, "lora.rank": 2, "init_from": "x"}, r"lora\.rank is 2, with distill\.method"),
        ({"on": 1, "pooled_dropout": 0.3}, r"pooled_dropout is 0\.3, with distill\.method"),
        ({"on": 1, "validation.every": 5}, r"validation\.every is 5, with distill\.method"),
    ],
)
def test_recipes_that_cannot_work_are_refused_in_one_line(keys: dict[str, Any], message: str) -> None:
    raw: dict[str, Any] = {"unet": "tiny-I", "text_encoder": "tiny", "data": {"size": 8}}
    if keys.pop("on", 0):
        raw |= {"text_encoder_from": "x", "prediction": "v", "bound_weight": 0.0}
        raw["distill"] = {"method": "progressive", "teacher": "x"}
    for name, value in keys.items():
        section, _, key = name.rpartition(".")
        (raw.setdefault(section, {}) if section else raw)[key] = value
    with pytest.raises(ValueError, match=message) as error:
        to_recipe(raw)
    assert "\n" not in str(error.value)


def test_teachers_that_do_not_fit_are_refused_by_name(cascade: Path, tmp_path: Path) -> None:
    def refused(message: str, folder: Path | str = "", **changes: Any) -> None:
        own = recipe_of(cascade, distill=DistillConfig("progressive", str(folder or cascade / "stage_I")), **changes)
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            warm_start.open_teacher(own)
        assert "\n" not in str(error.value)

    refused(r"nowhere", tmp_path / "nowhere")
    refused(
        r"distill\.teacher '.*stage_II' is a super-resolution stage, but recipe key stage is 'base'",
        cascade / "stage_II",
    )
    refused(r"it predicts 'v', recipe key prediction is 'x0' \(set prediction=v\)$", prediction="x0")
    refused(r"its noise schedule is another one .*\(set noise_size=64\)$", noise_size=512)
    refused(r"draws 8 px, but recipe key data\.size is 16: set data\.size=8", data=DataConfig(size=16))
    refused(r"no stage of it draws 32 px, but 8, 16", cascade, data=DataConfig(size=32))
    refused(r"draws with sample_max_value 1\.5, this recipe with 1: they must be one", sample_max_value=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.UNETS, "tiny-I", dataclasses.replace(presets.UNETS["tiny-I"], block_out_channels=(32,)))
        refused(r"distill\.teacher '.*' holds a net of another shape than 'tiny-I'.*name the release of this net")
    own = recipe_of(cascade)
    assert (
        warm_start.open_teacher(own)[1]
        == warm_start.open_teacher(
            dataclasses.replace(own, distill=dataclasses.replace(own.distill, teacher=str(cascade)))
        )[1]
    )  # a cascade stands for its stage of that size


def test_a_teacher_takes_its_memory_once_and_its_passes_count(cascade: Path) -> None:
    mesh = jax.sharding.AbstractMesh((1, 1, 1), ("data", "fsdp", "tensor"))
    own = recipe_of(cascade, compute_dtype="bfloat16")
    sizes = memory.step_bytes(own, tiny.TEXT, mesh, activations=False)
    assert sizes["teacher"] == sizes["parameters"] // 2  # bfloat16
    networks = setup.make_setup(own, tiny.TEXT, mesh).networks
    read = metrics.step_flops(dataclasses.replace(own, distill=DistillConfig()), networks)
    unet = (read - metrics.step_flops(own, networks)) / -(2 + 1)  # two branches, and the student that finishes
    halving = dataclasses.replace(own, distill=DistillConfig("progressive", "x", 1.0, 2, 5))
    assert metrics.step_flops(halving, networks) == pytest.approx(read + 5 * unet)


@pytest.mark.slow  # two programs for eight devices, and one for one
@pytest.mark.parametrize("kind", ["base", "super-resolution"])
def test_eight_devices_train_as_one(cascade: Path, tmp_path: Path, kind: str) -> None:
    results = []
    for name, mesh in (("one", MeshConfig(data=1)), ("eight", SPREAD)):
        if kind == "base":
            recipe = recipe_of(cascade, mesh=mesh, sample=SampleConfig(every=0))
        else:
            recipe = later_recipe(cascade, mesh=mesh)
        with pytest.MonkeyPatch.context() as patch:
            if name == "one":
                patch.setattr(loop.meshes, "make_mesh", partial(loop.meshes.make_mesh, devices=jax.devices()[:1]))
            loop.train(recipe, str(tmp_path / name))
        results.append(losses(tmp_path / name))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5)
    np.testing.assert_allclose(results[0], results[1], rtol=1e-3)
    assert len(set(results[0])) == 4
