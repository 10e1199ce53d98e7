"""The same release, noise and steps in stock diffusers and here: the same pictures, step for step and as a whole."""

from __future__ import annotations

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from if_jax.checkpoints import release
from if_jax.checkpoints.tensors import Storage
from if_jax.diffusion import samplers
from if_jax.diffusion.schedule import cosine_schedule, respace
from if_jax.inference.cascade import Cascade
from if_jax.inference.drawing import StageNoise, make_denoiser, stage_settings

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

PROMPTS = ["a red cube left of a blue sphere", "three yellow cubes"]


@pytest.fixture(scope="module", params=["float32", "float16"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("release") / "cascade"
    release.write_cascade(folder, tiny.stages(), tiny.DEFAULTS, storage=Storage(request.param))
    return folder


@pytest.fixture(scope="module")
def cascade(folder):
    return Cascade.load(folder)


def noise_for(size: int, steps: int, low: bool) -> StageNoise:
    rng = np.random.default_rng(size)
    shape = (len(PROMPTS), size, size, 3)
    low_res = rng.normal(size=shape).astype(np.float32) if low else None
    return StageNoise(
        rng.normal(size=shape).astype(np.float32), rng.normal(size=(steps, *shape)).astype(np.float32), low_res
    )


def to_torch(image):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(image), -1, 1)))


def to_numpy(image):
    return np.moveaxis(image.numpy(), 1, -1)


@pytest.fixture
def inject(monkeypatch):
    """Makes diffusers take its noise from a StageNoise, in the order in which its pipelines draw."""
    from diffusers.pipelines.deepfloyd_if import pipeline_if, pipeline_if_superresolution
    from diffusers.schedulers import scheduling_ddpm

    def start(noise: StageNoise) -> None:
        low = [] if noise.low_res is None else [noise.low_res]
        queue = iter([noise.initial, *low, *noise.steps[:0:-1]])
        for module in (pipeline_if, pipeline_if_superresolution, scheduling_ddpm):
            monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: to_torch(next(queue)))

    return start


def test_pictures_and_steps_agree(folder, cascade, inject):
    """Float32 in both, whatever the weights are stored in."""
    noise = {"I": noise_for(8, 3, False), "II": noise_for(16, 2, True)}
    ours = cascade.dream(PROMPTS, noise=noise, return_tensors=True)
    base = tiny.open_in_diffusers(folder / "stage_I")
    later = tiny.open_in_diffusers(folder / "stage_II", text_encoder=base.text_encoder, tokenizer=base.tokenizer)
    low = None
    for index, (name, pipeline) in enumerate((("I", base), ("II", later))):
        how = stage_settings(name, cascade.stages[index], cascade.defaults[index], None)
        states = [noise[name].initial]
        inject(noise[name])
        given = {} if low is None else {"image": to_torch(low), "noise_level": how.noise_level}
        theirs = pipeline(
            PROMPTS,
            timesteps=list(how.timesteps[::-1]),
            guidance_scale=how.guidance_scale,
            output_type="pt",
            callback=lambda i, t, x, states=states: states.append(to_numpy(x)),
            **given,
        ).images
        low = to_numpy(theirs)
        difference = np.abs(np.stack(ours[name]) - low)
        # Rounding alone gives 1e-7; a noise level that is off by one step gives 1e-4.
        assert difference.mean() <= 1e-5 and difference.max() <= 1e-3, name
        if name == "I":
            assert_steps_agree(cascade, how, noise[name], states)


def assert_steps_agree(cascade, how, noise, states):
    """Every step, started from the x_t of the reference."""
    stage = cascade.stages[0]
    text = cascade.embed([*PROMPTS, ""])
    schedule = respace(cosine_schedule(), how.timesteps)
    uncond = jnp.broadcast_to(text[2:], text[:2].shape)

    @jax.jit
    def step(x_t, i, z):
        denoise = make_denoiser(stage.unet_params, stage.unet_config, {"text": text[:2]}, uncond, how.guidance_scale)
        output = denoise(x_t, jnp.full(2, jnp.asarray(schedule.timesteps)[i]))
        return samplers.ancestral_step(schedule, output, x_t, jnp.full(2, i), z, sample_max_value=1.5)[0]

    indices = range(schedule.num_steps - 1, -1, -1)
    for i, (x_t, expected) in zip(indices, pairwise(states), strict=True):
        assert np.abs(step(x_t, i, noise.steps[i]) - expected).max() <= 1e-4 * np.abs(expected).max(), i
