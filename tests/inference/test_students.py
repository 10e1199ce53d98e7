"""A distilled cascade as a release: opened by stock diffusers with two arguments, drawn alike, in every mode."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from if_jax.checkpoints import lora as lora_files
from if_jax.checkpoints import release
from if_jax.checkpoints.scheduler import SchedulerConfig, scheduler_from_diffusers, scheduler_to_diffusers
from if_jax.checkpoints.stages import StageDefaults
from if_jax.checkpoints.weights import boxed_params
from if_jax.inference.cascade import Cascade
from if_jax.inference.settings import stage_settings
from if_jax.inference.stage_inputs import StageNoise
from if_jax.inference.verify import verify
from if_jax.models import lora

PROMPTS = ["a red cube left of a blue sphere", "three yellow cubes"]
TAUGHT: dict[str, Any] = {"variance_type": "fixed_small", "timestep_spacing": "trailing", "sampler": "ddim"}
SCHEDULERS = (
    SchedulerConfig(1.5, prediction_type="v_prediction", **TAUGHT),
    SchedulerConfig(1.0, prediction_type="sample", **TAUGHT),
)
DEFAULTS = (StageDefaults("trailing4", 1.0), StageDefaults("trailing2", 1.0, 200))
PICTURE = Image.fromarray(np.random.default_rng(1).integers(0, 255, (16, 16, 3), dtype=np.uint8))
MASK = Image.new("L", (16, 16), 0)
MASK.paste(255, (0, 0, 8, 16))


def students():
    stages = [tiny.on_one_level(stage) for stage in tiny.stages()]
    return [replace(stage, scheduler=own) for stage, own in zip(stages, SCHEDULERS, strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release") / "fast"
    release.write_cascade(folder, students(), DEFAULTS)
    return folder


@pytest.fixture(scope="module")
def cascade(folder):
    return Cascade.load(folder)


def noise_for(size: int, steps: int, low: bool) -> StageNoise:
    rng = np.random.default_rng(size)
    shape = (len(PROMPTS), size, size, 3)
    normal = lambda *lead: rng.normal(size=(*lead, *shape)).astype(np.float32)  # noqa: E731
    return StageNoise(normal(), np.zeros((steps, *shape), np.float32), normal() if low else None)


NOISE = {"I": noise_for(8, 4, False), "II": noise_for(16, 2, True)}


def test_stock_diffusers_draws_the_same_given_steps_and_guidance(folder, cascade, monkeypatch):
    """IFPipeline as it opens the folder: its scheduler, its spacing; `variance_type` says what six channels mean."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.deepfloyd_if import pipeline_if, pipeline_if_superresolution

    to_torch = lambda image: torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, -1, 1)))  # noqa: E731
    queue = iter([NOISE["I"].initial, NOISE["II"].initial, NOISE["II"].low_res])
    for module in (pipeline_if, pipeline_if_superresolution):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: to_torch(next(queue)))
    base = tiny.open_in_diffusers(folder / "stage_I")
    later = tiny.open_in_diffusers(folder / "stage_II", text_encoder=base.text_encoder, tokenizer=base.tokenizer)
    assert type(base) is diffusers.IFPipeline and type(base.scheduler) is diffusers.DDIMScheduler
    shared = {"prompt": PROMPTS, "guidance_scale": 1.0, "output_type": "pt"}
    low = base(num_inference_steps=4, **shared).images
    high = later(image=low, noise_level=200, num_inference_steps=2, **shared).images
    assert base.scheduler.timesteps.tolist() == [999, 749, 499, 249]
    drawn = cascade.dream(PROMPTS, noise=NOISE, batch_size=2, return_tensors=True)
    for ours, theirs in ((drawn["I"], low), (drawn["II"], high)):
        np.testing.assert_allclose(np.stack(ours), np.moveaxis(theirs.numpy(), 1, -1), atol=2e-4)


def test_the_release_says_how_it_draws(folder, cascade):
    for stage, default, steps in zip(cascade.stages, DEFAULTS, ([249, 499, 749, 999], [499, 999]), strict=True):
        settings = stage_settings("I", stage, default, None)
        assert (settings.sampler, settings.guided, list(settings.timesteps)) == ("ddim", False, steps)
        counted = stage_settings("I", stage, default, {"num_inference_steps": len(steps), "sample_loop": "dpm++"})
        assert list(counted.timesteps) == steps and counted.sampler == "dpm++"
    plain = cascade.dream(PROMPTS[0], stages=1, return_tensors=True)["I"][0]
    words = {"sample_loop": "ddim", "timesteps": [249, 499, 749, 999], "guidance_scale": 1.0}
    np.testing.assert_array_equal(
        cascade.dream(PROMPTS[0], stages=1, if_I_kwargs=words, return_tensors=True)["I"][0], plain
    )


@pytest.mark.slow  # programs of every network
def test_verify_knows_a_student_from_a_net_that_draws_by_ddpm(folder, tmp_path):
    one, other = folder / "stage_I", tmp_path / "other"
    ddpm = replace(SCHEDULERS[0], sampler="ddpm", timestep_spacing="leading")
    release.write_stage(other, replace(release.read_stage(one), scheduler=ddpm))
    assert not verify(one, one).failures
    report = verify(one, other)
    assert [row.name for row in report.failures] == ["scheduler"] and "'ddim' and 'ddpm'" in report.failures[0].note


def test_scheduler_files_of_ddim():
    content = scheduler_to_diffusers(SCHEDULERS[0])
    assert content["_class_name"] == "DDIMScheduler" and content["variance_type"] == "fixed_small"
    assert "sampler" not in content and scheduler_from_diffusers(content) == SCHEDULERS[0]
    for change in ({"timestep_spacing": "linspace"}, {"set_alpha_to_one": False}):
        with pytest.raises(ValueError, match=f"scheduler {next(iter(change))}") as error:
            scheduler_from_diffusers(content | change)
        assert "\n" not in str(error.value)


def test_a_student_draws_over_pictures_and_in_masks(cascade):
    """Style transfer takes the last three of its four jumps, with and without a style; inpainting keeps the rest."""
    shared = {"seed": 3, "return_tensors": True, "stages": 1}
    plain = cascade.style_transfer(PICTURE, PROMPTS[0], if_I_kwargs={"strength": 0.75}, **shared)["I"][0]
    styled = cascade.style_transfer(PICTURE, PROMPTS[0], style_prompt="in snow", **shared)["I"][0]
    kept = cascade.inpainting(PICTURE, MASK, PROMPTS[0], **shared)["I"][0]
    original = np.asarray(PICTURE.resize((8, 8), Image.Resampling.BICUBIC), np.float32) / 127.5 - 1
    assert np.isfinite(plain).all() and np.isfinite(styled).all() and np.abs(plain - styled).max() > 1e-3
    assert np.abs(kept[:, 4:] - original[:, 4:]).max() < 0.2 < np.abs(kept[:, :4] - original[:, :4]).max()
    with pytest.raises(ValueError, match=r"strength 0\.1 of 4 steps is no step: use 0\.25 or more"):
        cascade.style_transfer(PICTURE, PROMPTS[0], if_I_kwargs={"strength": 0.1}, **shared)


def test_a_lora_of_the_teacher_goes_into_the_student(folder, cascade, tmp_path):
    rng, config = np.random.default_rng(0), students()[0].unet_config
    abstract = jax.eval_shape(lambda: lora.init_factors(boxed_params(config), "attention", 2, jax.random.key(0)))
    factors = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), nn.unbox(abstract))
    lora_files.write_lora(tmp_path / "style.safetensors", {"unet": factors}, 2.0)
    shared = {"seed": 3, "return_tensors": True, "stages": 1}
    plain = cascade.dream(PROMPTS[0], **shared)["I"][0]
    for weight in (0.0, 1.0):
        own = Cascade.load(folder, stages=1, lora={tmp_path / "style.safetensors": weight})
        difference = np.abs(own.dream(PROMPTS[0], **shared)["I"][0] - plain).max()
        assert difference < 1e-6 if weight == 0 else difference > 1e-3
