"""What the four modes draw, and what they hand from stage to stage. Parity with diffusers is in test_parity.py."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from if_jax.checkpoints import release
from if_jax.config import DataConfig, Recipe
from if_jax.data.preprocessing import Preparation
from if_jax.inference import batching, denoise_stage
from if_jax.inference.cascade import Cascade
from if_jax.inference.settings import stage_settings
from if_jax.training.stage import stage_defaults

PROMPTS = ["a red cube", "two blue spheres", "a sign"]


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release") / "cascade"
    release.write_cascade(folder, [tiny.on_one_level(stage) for stage in tiny.stages()], tiny.DEFAULTS)
    return Cascade.load(folder)


IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 60, 3), dtype=np.uint8))
MASK = Image.new("L", (60, 30), 0)
MASK.paste(255, (0, 0, 30, 30))


@pytest.fixture
def calls(monkeypatch):
    """Replaces drawing by a record of what each stage gets; picture b of a stage is full of 1 + its prompt."""
    seen = []

    def begin(stage, settings, keys, inputs, *, size, dtype):
        seen.append({"stage": stage, "settings": settings, "keys": keys, "size": size, **vars(inputs)})
        shade = np.abs(inputs.text).sum((1, 2)) if inputs.low_res is None else inputs.low_res[:, 0, 0, 0] + 1
        return np.broadcast_to(shade[:, None, None, None], (len(shade), *size, 3)), None

    monkeypatch.setattr(batching, "begin_stage", begin)
    monkeypatch.setattr(batching, "finish_stage", lambda state, *_: state)
    return seen


def test_a_picture_is_its_seed_number_and_prompt(cascade):
    """Bit for bit, whatever is drawn beside it, and with its number alone; to rounding at another batch size."""
    all_three = cascade.dream(PROMPTS, seed=3, batch_size=2, return_tensors=True)  # [0, 1], [2, 2]
    alone = cascade.dream([PROMPTS[0]], seed=3, batch_size=2, return_tensors=True)
    third = cascade.dream([PROMPTS[2]], seed=3, batch_size=2, return_tensors=True, first_picture=2)
    for name, size in (("I", 8), ("II", 16)):
        assert all_three[name][0].shape == (size, size, 3) and all_three[name][0].dtype == np.float32
        assert np.array_equal(all_three[name][0], alone[name][0])
        assert np.array_equal(all_three[name][2], third[name][0])
        assert np.abs(all_three[name][0] - all_three[name][1]).mean() > 0.1
    mixed = cascade.dream(
        ["a sign", PROMPTS[0], PROMPTS[2]], seed=[9, 3, 3], first_picture=[5, 0, 2], batch_size=2, return_tensors=True
    )
    for name in ("I", "II"):  # one seed and number for each
        assert np.array_equal(mixed[name][1], all_three[name][0])
        assert np.array_equal(mixed[name][2], all_three[name][2])
        assert not np.array_equal(mixed[name][0], mixed[name][2])
    singly = cascade.dream(PROMPTS, seed=3, return_tensors=True, stages=1)  # a CPU draws one picture at a time
    assert list(singly) == ["I"]
    np.testing.assert_allclose(singly["I"], all_three["I"], atol=2e-5)
    other = cascade.dream(PROMPTS, seed=4, stages=1, return_tensors=True)
    assert np.abs(other["I"][0] - singly["I"][0]).mean() > 0.1


def test_twenty_requests_compile_nothing(cascade):
    usual = cascade.dream("a", return_tensors=True)
    compiled = denoise_stage._advance._cache_size(), denoise_stage._begin._cache_size()
    seen = []
    for k in range(20):
        words = {"guidance_scale": 1.5 + 0.5 * k, "dynamic_thresholding_c": 1.0 + 0.1 * (k % 3)}
        words |= {"sample_timestep_respacing": ("5", "ays10", "3,2,1", "ddim4")[k % 4], "dynamic_thresholding_p": 0.9}
        later = {"noise_level": 10 * k, "guidance_scale": 2.0 + k, "timesteps": [0, 5 + k, 999]}
        options = {"seed": k, "negative_prompt": "dull" * (k % 2), "if_I_kwargs": words, "if_II_kwargs": later}
        seen.append(cascade.dream(f"prompt {k}", return_tensors=True, **options)["II"][0])
    assert (denoise_stage._advance._cache_size(), denoise_stage._begin._cache_size()) == compiled
    for before, after in pairwise([usual["II"][0], *seen]):
        assert np.abs(before - after).mean() > 1e-3  # rounding alone gives 1e-6


def test_a_fixed_variance_draws_as_a_net_that_always_predicts_it():
    """Its upper half of channels says −1, the posterior variance, whatever it sees."""
    stage = tiny.on_one_level(tiny.stages()[0])
    kernel, bias = (stage.unet_params["conv_out"][name].copy() for name in ("kernel", "bias"))
    kernel[..., 3:], bias[3:] = 0.0, -1.0
    says_so = replace(stage, unet_params=dict(stage.unet_params, conv_out={"kernel": kernel, "bias": bias}))
    fixed = replace(stage, scheduler=replace(stage.scheduler, variance_type="fixed_small"))
    drawn = [
        Cascade.of([each], tiny.DEFAULTS[:1]).dream("a", return_tensors=True)["I"] for each in (fixed, says_so, stage)
    ]
    np.testing.assert_allclose(drawn[0], drawn[1], atol=1e-5)
    assert np.abs(np.subtract(drawn[0], drawn[2])).mean() > 1e-3


def test_what_depends_on_the_text_alone_is_computed_once(cascade, monkeypatch):
    """In the compiled program its products stand outside the loop: the compiler has moved them there."""
    programs = []

    def compile_only(*args, **kwargs):
        programs.append(advance.lower(*args, **kwargs).compile().as_text())
        return SimpleNamespace(x=np.zeros((1, 8, 8, 3)))

    advance = denoise_stage._advance
    monkeypatch.setattr(denoise_stage, "_advance", compile_only)
    cascade.dream("a", stages=1)
    computations = dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", programs[0], re.S | re.M))
    inside = set(re.findall(r"body=%?([\w.\-]+)", programs[0]))
    assert inside
    for _ in range(9):  # computations that the body calls, and those that they call
        inside |= {name for own in inside for name in re.findall(r"=%?([\w.\-]+)", computations.get(own, ""))}
    products = re.compile(r" dot\([^\n]*op_name=\"[^\"]*(add_k_proj|add_v_proj|add_embedding|encoder_hid_proj|to_q)")
    where = {name: products.findall(text) for name, text in computations.items()}
    in_body = [product for name, rows in where.items() if name in inside for product in rows]
    outside = [product for name, rows in where.items() if name not in inside for product in rows]
    assert set(in_body) == {"to_q"} and {*outside} == {"add_k_proj", "add_v_proj", "add_embedding", "encoder_hid_proj"}


def test_strength_and_noise_of_a_style_transfer_are_numbers_too(cascade):
    def transfer(**words):
        kwargs = {"sample_timestep_respacing": "6", **words}
        return cascade.style_transfer(IMAGE, "a", if_I_kwargs=kwargs, stages=1, return_tensors=True)["I"][0]

    usual = transfer()
    compiled = denoise_stage._advance._cache_size(), denoise_stage._begin._cache_size()
    original = np.asarray(IMAGE.resize((16, 8), Image.Resampling.BICUBIC), np.float32) / 127.5 - 1
    weak, less = transfer(strength=0.2), transfer(less_qsample_steps=3)
    assert (denoise_stage._advance._cache_size(), denoise_stage._begin._cache_size()) == compiled
    assert usual.shape == (8, 16, 3) and np.abs(less - usual).mean() > 1e-3
    assert np.abs(weak - original).mean() < np.abs(usual - original).mean()


def test_inpainting_keeps_what_is_not_masked(cascade):
    words = {"if_II_kwargs": {"sample_timestep_respacing": "6"}}  # of two steps, a strength of 0.8 is one
    drawn = cascade.inpainting(IMAGE, MASK, "a red cube", return_tensors=True, **words)
    for name, (height, width) in (("I", (8, 16)), ("II", (16, 32))):
        original = np.asarray(IMAGE.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 127.5 - 1
        image = drawn[name][0]
        np.testing.assert_array_equal(image[:, width // 2 :], original[:, width // 2 :])
        assert np.abs(image - original)[:, : width // 2].mean() > 0.05


def test_every_mode_hands_its_proportions_on(cascade, calls):
    drawn = cascade.dream("a", aspect_ratio="2:1")
    assert drawn["I"][0].size == (16, 8) and drawn["II"][0].size == (32, 16)
    assert cascade.style_transfer(image=IMAGE, style_prompt="b")["II"][0].size == (32, 16)
    style = calls[-1]["style"]
    np.testing.assert_array_equal(style, cascade.embed(["b"]))
    np.testing.assert_array_equal(calls[-1]["text"], style)  # alone, it is the prompt as well
    assert [call["settings"].strength for call in calls[-2:]] == [0.7, 0.8]
    assert calls[-2]["support"].shape == (1, 8, 16, 3) and calls[-1]["support"].shape == (1, 16, 32, 3)
    assert list(cascade.super_resolution(IMAGE)) == ["II"] and calls[-1]["size"] == (16, 32)
    assert calls[-1]["low_res"].shape == (1, 8, 16, 3)
    np.testing.assert_array_equal(calls[-1]["text"], cascade.embed([""]))
    upright = cascade.super_resolution(IMAGE.rotate(90, expand=True), ["a", "b"])["II"]
    assert [picture.size for picture in upright] == [(16, 32)] * 2
    cascade.inpainting(IMAGE, MASK, ["a", "b"], negative_prompt="dull", if_II_kwargs={"strength": 0.5})
    assert calls[-1]["settings"].noise_level == 0 and calls[-1]["settings"].strength == 0.5
    np.testing.assert_array_equal(calls[-1]["uncond"], cascade.embed(["dull"]))


def test_a_style_prompt_changes_the_picture_as_far_as_it_is_mixed_in(cascade):
    def draw(mixer, style="a green sign"):
        words = {"positive_mixer": mixer, "guidance_scale": 1000.0}  # random nets hear little of their texts
        return cascade.dream("a", style_prompt=style, stages=1, if_I_kwargs=words, return_tensors=True)["I"][0]

    difference = np.abs(draw(0.0) - draw(1.0)).mean()
    assert difference > 1e-3
    plain = cascade.dream("a", stages=1, if_I_kwargs={"guidance_scale": 1000.0}, return_tensors=True)["I"][0]
    assert np.abs(draw(0.3, style="a") - plain).mean() < 0.1 * difference  # its own prompt for a style is no style


def test_callback_sees_every_step_and_changes_nothing(cascade):
    steps, progress = [], []
    words = {"sample_timestep_respacing": "5"}
    seen = cascade.dream(
        PROMPTS[:1],
        stages=1,
        if_I_kwargs=words,
        return_tensors=True,
        callback=steps.append,
        progress=lambda *row: progress.append(row),
    )["I"][0]
    assert [step.left for step in steps] == [4, 3, 2, 1, 0]
    assert [step.timestep for step in steps] == [999, 749, 500, 250, 0]
    assert progress == [("I", done, 5) for done in range(6)]
    np.testing.assert_array_equal(steps[-1].x[0], seen)
    np.testing.assert_allclose(steps[-1].x0[0], seen, atol=1e-5)
    plain = cascade.dream(PROMPTS[:1], stages=1, if_I_kwargs=words, return_tensors=True)["I"][0]
    np.testing.assert_array_equal(plain, seen)


def test_an_interval_of_guidance_is_guided_there_alone(cascade):
    """Equal to guidance everywhere where it holds all steps, and to none where it holds no step."""

    def draw(**words):
        words = {"sample_timestep_respacing": "6", "guidance_scale": 400.0} | words
        return cascade.dream("a", stages=1, if_I_kwargs=words, return_tensors=True)["I"][0]

    everywhere, nowhere = draw(), draw(guidance_scale=1.0)
    apart = np.abs(everywhere - nowhere).mean()
    assert apart > 1e-3
    assert np.abs(draw(guidance_interval=(0, 999)) - everywhere).mean() < 0.02 * apart
    assert np.abs(draw(guidance_interval=(1, 150)) - nowhere).mean() < 0.02 * apart
    middle = draw(guidance_interval=(300, 700))
    assert min(np.abs(middle - everywhere).mean(), np.abs(middle - nowhere).mean()) > 0.05 * apart


@pytest.mark.parametrize(
    ("interval", "counts"),
    [(None, [0, 3, 0]), ((0, 999), [0, 3, 0]), ((400, 500), [1, 1, 1]), ((10, 20), [3, 0, 0]), ((800, 900), [0, 0, 3])],
)
def test_steps_above_in_and_below_the_interval(interval, counts):
    chosen = {"timesteps": [0, 300, 450, 700, 999], "guidance_interval": interval}
    words = stage_settings("I", tiny.stages()[0], tiny.DEFAULTS[0], chosen)
    assert denoise_stage._counts(words, 3, 3).tolist() == counts


def test_stage_two_is_shown_what_stage_one_drew_unclamped(cascade, calls):
    drawn = cascade.dream(PROMPTS, batch_size=2, return_tensors=True)
    base = [call for call in calls if call["low_res"] is None]
    later = [call for call in calls if call["low_res"] is not None]
    assert len(base) == len(later) == 2
    for first, second in zip(base, later, strict=True):
        assert second["low_res"].shape[1:] == (8, 8, 3) and np.min(second["low_res"]) > 1.5
        assert np.array_equal(first["text"], second["text"])
        assert not np.array_equal(jax.random.key_data(first["keys"]), jax.random.key_data(second["keys"]))
    shades = np.abs(cascade.embed(PROMPTS)).sum((1, 2))
    np.testing.assert_allclose([image[0, 0, 0] for image in drawn["II"]], shades + 1, rtol=1e-5)
    assert [picture.size for picture in cascade.dream(PROMPTS)["II"]] == [(16, 16)] * 3


def test_negative_prompt_is_for_stage_one_only(cascade, calls):
    empty, ugly, dull = cascade.embed(["", "ugly", "dull"])
    for options in (
        {},
        {"negative_prompt": "ugly"},
        {"negative_prompt": ["ugly", "dull"]},
        {"negative_prompt_embeds": dull[None]},
    ):
        cascade.dream(PROMPTS[:2], batch_size=2, **options)
    expected = [(empty, empty), (ugly, ugly), (ugly, dull), (dull, dull)]
    for call, states in zip(calls[::2], expected, strict=True):
        assert np.array_equal(call["uncond"], np.stack(states))
    for call in calls[1::2]:
        assert np.array_equal(call["uncond"], np.stack([empty, empty]))


def test_prompt_embeds_in_place_of_prompts(cascade, calls):
    cascade.dream(PROMPTS, batch_size=3)
    cascade.dream(prompt_embeds=cascade.embed(PROMPTS), batch_size=3)
    assert all(np.array_equal(calls[i]["text"], calls[i + 2]["text"]) for i in range(2))


def test_prompts_are_cleaned_as_if_cleans_them(cascade):
    cleaned = cascade.embed(["A Red  Cube", "a red cube"])
    assert np.array_equal(cleaned[0], cleaned[1])
    raw = cascade.embed(["A Red  Cube", "a red cube"], clean_caption=False)
    assert not np.array_equal(raw[0], raw[1])


def test_prompts_keep_their_case_where_the_captions_of_training_did(cascade, tmp_path):
    """From recipe to release to text states; IF's own rule, lower case, needs no word in the release."""
    recipe = Recipe(data=DataConfig(preparation=Preparation(preserve_case=True)))
    assert stage_defaults(recipe).preserve_case and not stage_defaults(Recipe()).preserve_case
    defaults = [replace(default, preserve_case=True) for default in tiny.DEFAULTS]
    release.write_cascade(tmp_path / "kept", cascade.stages, defaults)
    assert '"preserve_case": true' in (tmp_path / "kept" / "cascade.json").read_text()
    kept = Cascade.load(tmp_path / "kept")
    assert kept.defaults == tuple(defaults)
    texts = ["A red Cube", "a red cube"]
    for clean in (True, False):
        upper, lower = kept.embed(texts, clean_caption=clean)
        assert not np.array_equal(upper, lower)
        assert np.array_equal(cascade.embed(texts, clean_caption=clean), np.stack([lower, lower]))
    with pytest.raises(ValueError, match="stage II was trained on captions in lower case, stage I on captions with"):
        Cascade.of(cascade.stages, [defaults[0], tiny.DEFAULTS[1]])


def test_without_guidance_the_other_half_is_not_computed(cascade, monkeypatch):
    """Of the program itself: how many rows its first convolution has for one picture."""
    rows, advance = [], denoise_stage._advance

    def lower_only(*args, **kwargs):
        convolutions = re.findall(
            r"convolution\(.*?\(tensor<(\d+)x8x8x3xf32>", advance.lower(*args, **kwargs).as_text()
        )
        rows.append({int(count) for count in convolutions})
        return SimpleNamespace(x=np.zeros((1, 8, 8, 3)))

    monkeypatch.setattr(denoise_stage, "_advance", lower_only)
    for options in ({"guidance_scale": 1.0}, {"guidance_scale": 1.5}, {"guidance_scale": 0.0}):
        cascade.dream("a", stages=1, if_I_kwargs=options)
    cascade.dream("a", stages=1, style_prompt="b")
    cascade.dream("a", stages=1, if_I_kwargs={"guidance_interval": (300, 700)})
    assert rows == [{1}, {2}, {2}, {3}, {1, 2}]


@pytest.mark.parametrize(("total", "batch_size"), [(1, 1), (1, 4), (4, 4), (5, 4), (9, 2)])
def test_tiles_are_of_one_size_and_cover_all(total, batch_size):
    tiles = list(batching._tiles(total, batch_size))
    assert {len(rows) for rows in tiles} == {batch_size} and len(tiles) == -(-total // batch_size)
    assert np.array_equal(np.concatenate(tiles)[:total], np.arange(total))


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
        ({"prompt": "a", "stages": 1, "if_II_kwargs": {"strength": 0.1}}, "stage II is not drawn, only I"),
        ({"prompt": "a", "if_I_kwargs": {"positive_mixer": 0.1}}, "positive_mixer is the share of the style"),
        (
            {"prompt": "a", "negative_prompt": "b", "if_I_kwargs": {"guidance_scale": 1.0}},
            "negative_prompt does nothing at guidance_scale 1",
        ),
        ({"prompt": "a" * 30_000}, "a text of 30000 characters"),
        ({"prompt": "a", "aspect_ratio": "0:3"}, "aspect_ratio is '0:3'"),
        ({"prompt": "a", "first_picture": -2}, "first_picture is -2"),
        ({"prompt": "a", "if_I_kwargs": {"strength": 0.5}}, "strength is for pictures that are drawn over"),
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


@pytest.mark.parametrize(
    ("mode", "arguments", "message"),
    [
        ("style_transfer", {"prompt": "a"}, "give support_pil_img"),
        ("style_transfer", {"image": IMAGE, "support_pil_img": IMAGE, "prompt": "a"}, "give support_pil_img"),
        ("style_transfer", {"image": IMAGE}, "either prompt or prompt_embeds"),
        ("style_transfer", {"image": [IMAGE] * 2, "prompt": ["a"] * 3}, "2 pictures .* for 3 prompts"),
        ("super_resolution", {"image": [IMAGE, MASK.rotate(90, expand=True)]}, "2 pictures of different proportions"),
        ("super_resolution", {"image": IMAGE, "stage": "I"}, "the super-resolution stages of this cascade are II"),
        ("super_resolution", {"image": IMAGE, "stages": 1}, "stages is 1"),
        ("super_resolution", {"image": np.zeros((8, 8))}, r"array of float64 \(8, 8\)"),
        ("inpainting", {"image": IMAGE, "prompt": "a"}, "give inpainting_mask"),
        ("inpainting", {"image": IMAGE, "mask_image": Image.new("L", (30, 60)), "prompt": "a"}, "mask is 30x60"),
        ("inpainting", {"image": IMAGE, "mask_image": [MASK] * 2, "prompt": "a"}, "2 masks for 1 pictures"),
    ],
)
def test_wrong_pictures_are_one_line(cascade, calls, mode, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        getattr(cascade, mode)(**arguments)
    assert "\n" not in str(error.value)


def test_an_unknown_argument_is_named(cascade):
    with pytest.raises(TypeError, match="unknown argument 'width'"):
        cascade.dream("a", width=3)


def test_out_of_memory_says_what_to_lower(cascade, monkeypatch):
    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 3 bytes")

    monkeypatch.setattr(batching, "begin_stage", fail)
    with pytest.raises(MemoryError, match=r"stage I, 1 picture.* of 8x8 .* bfloat16 .* fewer stages"):
        cascade.dream(["a", "b"], batch_size=2)


def test_a_batch_that_does_not_fit_is_split(cascade, monkeypatch):
    tried = []

    def only_two_fit(_, __, keys, inputs, **___):
        tried.append(len(inputs.text))
        if tried[-1] > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 3 bytes")
        return np.asarray(jax.random.uniform(keys[0], (tried[-1], 8, 8, 3))), None

    monkeypatch.setattr(batching, "begin_stage", only_two_fit)
    monkeypatch.setattr(batching, "finish_stage", lambda state, *_: state)
    drawn = cascade.dream([*"abcde"], batch_size=5, stages=1)
    assert tried == [5, 2, 2, 2] and len(drawn["I"]) == 5


def test_no_more_noise_than_a_stage_was_trained_with(cascade, tmp_path):
    """Its release says how much; one that says nothing takes any."""
    first, second = tiny.DEFAULTS
    stages = [tiny.on_one_level(stage) for stage in tiny.stages()]
    release.write_cascade(tmp_path / "cascade", stages, [first, replace(second, max_noise_level=250)])
    limited = Cascade.load(tmp_path / "cascade")
    assert limited.defaults[1].max_noise_level == 250 and cascade.defaults[1].max_noise_level == 999
    for words in ({"noise_level": 251}, {"aug_level": 0.5}):
        with pytest.raises(ValueError, match=r"is more noise than this stage was trained with: use noise_level 0…250"):
            limited.dream("a", if_II_kwargs=words)
        stage_settings("II", cascade.stages[1], cascade.defaults[1], words)
