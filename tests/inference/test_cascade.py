"""What a cascade draws, and what it hands from stage to stage. Parity with diffusers is in test_parity.py."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny

from if_jax.checkpoints import release
from if_jax.inference import cascade as cascade_module
from if_jax.inference import drawing
from if_jax.inference.cascade import Cascade
from if_jax.inference.drawing import stage_settings

PROMPTS = ["a red cube", "two blue spheres", "a sign"]


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release") / "cascade"
    release.write_cascade(folder, tiny.stages(), tiny.DEFAULTS)
    return Cascade.load(folder)


@pytest.fixture
def calls(monkeypatch):
    """Replaces drawing by a record of what each stage was given; picture b of a stage is full of 1 + its prompt."""
    seen = []

    def draw(stage, settings, keys, **inputs):
        seen.append({"stage": stage, "settings": settings, "keys": keys, **inputs})
        size = stage.unet_config.sample_size
        shade = np.abs(inputs["text"]).sum((1, 2)) if inputs["low_res"] is None else inputs["low_res"][:, 0, 0, 0] + 1
        return np.broadcast_to(shade[:, None, None, None], (len(shade), size, size, 3))

    monkeypatch.setattr(cascade_module, "draw_stage", draw)
    return seen


def test_pictures_do_not_depend_on_their_batch(cascade):
    pairs = cascade.dream(PROMPTS, seed=3, batch_size=2, return_tensors=True)  # [0, 1], [2, 2]
    again = cascade.dream([PROMPTS[0], "something else"], seed=3, return_tensors=True)
    for name, size in (("I", 8), ("II", 16)):
        assert pairs[name][0].shape == (size, size, 3) and pairs[name][0].dtype == np.float32
        assert np.array_equal(pairs[name][0], again[name][0])
        assert np.abs(pairs[name][0] - pairs[name][1]).mean() > 0.1
    alone = cascade.dream(PROMPTS, seed=3, batch_size=1, return_tensors=True, stages=1)
    assert list(alone) == ["I"]
    np.testing.assert_allclose(alone["I"], pairs["I"], atol=2e-5)
    other = cascade.dream(PROMPTS, seed=4, batch_size=2, stages=1, return_tensors=True)
    assert np.abs(other["I"][0] - pairs["I"][0]).mean() > 0.1


def test_one_compilation_serves_other_scales_levels_and_steps(cascade):
    usual = cascade.dream(PROMPTS[:2], return_tensors=True)
    compiled = drawing._draw._cache_size()
    given = {"guidance_scale": 2.0, "timesteps": [5, 400, 900]}
    changed = cascade.dream(PROMPTS[:2], if_I_kwargs=given, if_II_kwargs={"noise_level": 5}, return_tensors=True)
    assert drawing._draw._cache_size() == compiled
    for name in ("I", "II"):
        assert np.abs(changed[name][0] - usual[name][0]).mean() > 1e-3, name  # rounding alone gives 1e-6


def test_stage_two_is_shown_what_stage_one_drew_unclamped(cascade, calls):
    drawn = cascade.dream(PROMPTS, batch_size=2, return_tensors=True)
    one, two = (
        [call for call in calls if call["low_res"] is None],
        [call for call in calls if call["low_res"] is not None],
    )
    assert len(one) == len(two) == 2
    for first, second in zip(one, two, strict=True):
        assert second["low_res"].shape[1:] == (8, 8, 3) and np.min(second["low_res"]) > 1.5
        assert np.array_equal(first["text"], second["text"])
        assert not np.array_equal(jax.random.key_data(first["keys"]), jax.random.key_data(second["keys"]))
    shades = np.abs(cascade.embed(PROMPTS)).sum((1, 2))
    np.testing.assert_allclose([image[0, 0, 0] for image in drawn["II"]], shades + 1, rtol=1e-5)
    assert [picture.size for picture in cascade.dream(PROMPTS)["II"]] == [(16, 16)] * 3


def test_negative_prompt_is_for_stage_one_only(cascade, calls):
    empty, ugly, dull = cascade.embed(["", "ugly", "dull"])
    cascade.dream(PROMPTS[:2])
    cascade.dream(PROMPTS[:2], negative_prompt="ugly")
    cascade.dream(PROMPTS[:2], negative_prompt=["ugly", "dull"])
    cascade.dream(PROMPTS[:2], negative_prompt_embeds=dull[None])
    expected = [(empty, empty), (ugly, ugly), (ugly, dull), (dull, dull)]
    for call, states in zip(calls[::2], expected, strict=True):
        assert np.array_equal(call["uncond"], np.stack(states))
    for call in calls[1::2]:
        assert np.array_equal(call["uncond"], np.stack([empty, empty]))


def test_prompt_embeds_in_place_of_prompts(cascade, calls):
    cascade.dream(PROMPTS)
    cascade.dream(prompt_embeds=cascade.embed(PROMPTS))
    assert all(np.array_equal(calls[i]["text"], calls[i + 2]["text"]) for i in range(2))


def test_prompts_are_cleaned_as_if_cleans_them(cascade):
    cleaned = cascade.embed(["A Red  Cube", "a red cube"])
    assert np.array_equal(cleaned[0], cleaned[1])
    raw = cascade.embed(["A Red  Cube", "a red cube"], clean_caption=False)
    assert not np.array_equal(raw[0], raw[1])


def test_progress_counts_pictures(cascade, calls):
    told = []
    cascade.dream(PROMPTS, batch_size=2, progress=lambda *row: told.append(row))
    assert told == [(name, done, 3) for name in ("I", "II") for done in (0, 2, 3)]


def test_without_guidance_the_other_half_is_not_computed(cascade, monkeypatch):
    given = []
    monkeypatch.setattr(drawing, "_draw", lambda *args, **kwargs: given.append(args))
    stage = cascade.stages[0]
    for scale in (1.0, 1.5, 0.0):
        how = stage_settings("I", stage, tiny.DEFAULTS[0], {"guidance_scale": scale})
        drawing.draw_stage(stage, how, None, "text", "uncond")
    assert [row[4] for row in given] == [None, "uncond", "uncond"]


@pytest.mark.parametrize("total", [1, 4, 5, 9, 16])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_chunks_are_equal_and_cover_all(total, batch_size):
    chunks = list(cascade_module._chunks(total, batch_size))
    assert len({len(rows) for rows in chunks}) == 1 and len(chunks[0]) <= batch_size
    assert np.array_equal(np.concatenate(chunks)[:total], np.arange(total))
    assert len(np.concatenate(chunks)) < total + len(chunks)


def settings(kind="super-resolution", **given):
    stage = tiny.stages()[kind == "super-resolution"]
    name = "II" if kind == "super-resolution" else "I"
    return stage_settings(name, stage, tiny.DEFAULTS[name == "II"], given)


def test_words_of_if_and_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    for steps in (1, 7, 27, 50, 100):
        scheduler.set_timesteps(steps)
        assert settings(num_inference_steps=steps).timesteps == tuple(scheduler.timesteps.tolist()[::-1])
    assert settings().timesteps == (0, 999) and settings().noise_level == 200
    assert settings(timesteps=[900, 10, 0]).timesteps == (0, 10, 900)
    assert len(settings(sample_timestep_respacing="smart27").timesteps) == 27
    assert settings(aug_level=0.25).noise_level == settings(noise_level=250).noise_level == 250
    assert settings(aug_level=0.0).noise_level == 0 and settings("base").noise_level is None
    assert settings().guidance_scale == 3.0 and settings(guidance_scale=1).guidance_scale == 1.0
    changed = settings(dynamic_thresholding_p=0.9, dynamic_thresholding_c=2).scheduler
    assert changed == replace(tiny.stages()[1].scheduler, dynamic_thresholding_ratio=0.9, sample_max_value=2.0)


@pytest.mark.parametrize(
    ("kind", "given", "message"),
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
    ],
)
def test_wrong_settings_are_one_line(kind, given, message):
    with pytest.raises(ValueError, match=message) as error:
        settings(kind, **given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either prompt or prompt_embeds"),
        ({"prompt": "a", "prompt_embeds": np.zeros((1, 77, 32))}, "either prompt or prompt_embeds"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [3]}, "prompt holds 3"),
        ({"prompt_embeds": np.zeros((1, 77, 31))}, r"prompt_embeds has shape \(1, 77, 31\)"),
        ({"prompt": ["a"] * 3, "negative_prompt": ["b"] * 2}, "2 negative prompts for 3 prompts"),
        ({"prompt": "a", "negative_prompt_embeds": np.zeros((3, 77, 32))}, "3 negative prompts for 1"),
        ({"prompt": "a", "seed": -1}, "seed is -1"),
        ({"prompt": "a", "seed": 0.5}, "seed is 0.5"),
        ({"prompt": "a", "stages": 3}, "stages is 3: this cascade has 2"),
        ({"prompt": "a", "batch_size": 0}, "batch_size is 0"),
        ({"prompt": "a", "if_III_kwargs": {"aug_level": 0.1}}, "if_III_kwargs is given, but this cascade has 2"),
    ],
)
def test_wrong_arguments_are_one_line(cascade, calls, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        cascade.dream(**arguments)
    assert "\n" not in str(error.value)


def test_load_says_what_is_missing(tmp_path, cascade):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Cascade.load(tmp_path / "none")
    release.write_cascade(tmp_path / "one", tiny.stages()[:1], tiny.DEFAULTS[:1])
    with pytest.raises(ValueError, match=r"stages is 2, but .* has 1"):
        Cascade.load(tmp_path / "one", stages=2)
    with pytest.raises(ValueError, match="stages is 0"):
        Cascade.load(tmp_path / "one", stages=0)
