"""The words a stage is told to draw by: IF's and those of diffusers, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny

from if_jax.checkpoints.scheduler import SchedulerConfig
from if_jax.inference.settings import stage_settings


def settings(kind="super-resolution", **kwargs):
    stage = tiny.stages()[kind == "super-resolution"]
    name = "II" if kind == "super-resolution" else "I"
    return stage_settings(name, stage, tiny.DEFAULTS[name == "II"], kwargs)


def test_words_of_if_and_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    for steps in (1, 7, 27, 50, 100):
        scheduler.set_timesteps(steps)
        assert settings(num_inference_steps=steps).timesteps == tuple(scheduler.timesteps.tolist()[::-1])
    for spacing in ({"timestep_spacing": "trailing"}, {"timestep_spacing": "linspace"}, {"steps_offset": 1}):
        scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", **spacing)
        scheduler.set_timesteps(7)
        ours = SchedulerConfig(1.5, **spacing).spread(7)
        assert sorted(ours) == sorted(scheduler.timesteps.tolist())
    assert settings().timesteps == (0, 999) and settings().noise_level == 200
    assert settings(timesteps=[900, 10, 0]).timesteps == (0, 10, 900)
    assert len(settings(sample_timestep_respacing="smart27").timesteps) == 27
    assert settings(aug_level=0.25).noise_level == settings(noise_level=250).noise_level == 250
    assert settings(aug_level=0.0).noise_level == 0 and settings("base").noise_level is None
    assert settings().guidance_scale == 3.0 and settings(guidance_scale=1).guidance_scale == 1.0
    changed = settings(dynamic_thresholding_p=0.9, dynamic_thresholding_c=2).scheduler
    assert changed == replace(tiny.stages()[1].scheduler, dynamic_thresholding_ratio=0.9, sample_max_value=2.0)


@pytest.mark.parametrize(
    ("kind", "kwargs", "message"),
    [
        ("base", {"guidance": 3}, r"if_I_kwargs has no 'guidance' \(value 3\)"),
        ("base", {"noise_level": 3}, "if_I_kwargs has no 'noise_level'"),
        ("base", {"num_inference_steps": 5, "sample_timestep_respacing": "5"}, "two words for one thing"),
        ("super-resolution", {"aug_level": 0.1, "noise_level": 100}, "two words for one thing"),
        ("super-resolution", {"aug_level": 1.0}, r"aug_level 1\.0 is out of range"),
        ("super-resolution", {"noise_level": -1}, "noise_level -1 is out of range"),
        ("super-resolution", {"num_inference_steps": 0}, r"num_inference_steps 0: 0 is not in 1…1000"),
        ("base", {"sample_timestep_respacing": "smart51"}, "'smart51'"),
        ("base", {"timesteps": [0, 1000]}, "timesteps"),
        ("base", {"dynamic_thresholding_p": 1.5}, "dynamic_thresholding_ratio 1.5"),
        ("base", {"guidance_scale": "high"}, "guidance_scale 'high'"),
        ("base", {"guidance_scale": float("inf")}, "guidance_scale inf is no finite number"),
        ("base", {"sample_loop": "euler"}, "sample_loop 'euler' is unknown: use one of ddpm, ddim, dpm"),
        ("base", {"eta": 2}, "eta 2 is out of range"),
        ("base", {"eta": 0.5}, "eta 0.5 does nothing with sample_loop 'ddpm'"),
        ("base", {"clipped_eps": True, "sample_loop": "dpm++"}, "clipped_eps True does nothing"),
        ("base", {"apg": True, "guidance_scale": 1.0}, "apg True does nothing at guidance_scale 1"),
        ("base", {"positive_mixer": -0.1}, "positive_mixer -0.1 is out of range"),
        ("base", {"guidance_interval": [9, 3]}, "guidance_interval"),
        ("base", {"apg": [0.1]}, "apg"),
        ("base", {"strength": 0.0}, "strength 0.0 of 3 steps is no step"),
        ("base", {"less_qsample_steps": 3}, "less_qsample_steps 3 of 3 steps"),
    ],
)
def test_wrong_settings_are_one_line(kind, kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        settings(kind, **kwargs)
    assert "\n" not in str(error.value)
