"""IF's guard: its arithmetic against IF's own code and diffusers' network, and what it does to pictures."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_clip
from PIL import Image

from if_jax import Cascade
from if_jax.checkpoints.guard_weights import read_guard
from if_jax.checkpoints.release import write_cascade
from if_jax.inference import guard as guards
from if_jax.inference.guard import SafetyGuard

WIDTH = tiny_clip.VISION.projection_dim
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny CLIP beside two heads: one that lets all pass, one that does so but for a bias."""
    place = tiny_clip.write(tmp_path_factory.mktemp("guard") / "weights")
    _heads(place, -20.0, -20.0)
    return place


def _heads(place: Path, unsafe: float, watermark: float) -> None:
    for name, bias in (("p_head_v1", unsafe), ("w_head_v1", watermark)):
        np.savez(place / f"{name}.npz", weights=RNG.normal(size=WIDTH).astype(np.float32), biases=np.float32(bias))


@pytest.fixture(scope="module")
def original():
    """IF's own functions, from its wheel; torchvision, which it imports, is not there and not needed here."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("torchvision", "torchvision.transforms"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        try:
            spec = importlib.util.find_spec("deepfloyd_if")
        except ImportError:
            spec = None
        if spec is None or not spec.submodule_search_locations:
            pytest.skip("needs tests/fetch_assets.py")
        place = Path(spec.submodule_search_locations[0])
        module = types.ModuleType("deepfloyd_utils")
        exec(compile((place / "modules/utils.py").read_text(), "utils.py", "exec"), module.__dict__)
    return module, place / "resources"


def test_probabilities_are_those_of_ifs_code_with_its_own_heads(original):
    module, resources = original
    features = (RNG.normal(size=(50, 768)) * 3).astype(np.float16)
    for name in ("p_head_v1", "w_head_v1"):
        weights, bias = module.load_model_weights(resources / f"{name}.npz")
        want = module.predict_proba(features, weights, bias)
        assert want.min() < 0.4 and want.max() > 0.6
        np.testing.assert_allclose(guards.probability(features, weights, float(bias)), want, atol=1e-6)


@pytest.mark.parametrize("size", [(64, 64), (300, 256)])
def test_pictures_reach_clip_as_in_torch(size):
    torch = pytest.importorskip("torch")
    picture = RNG.uniform(-1, 1, (1, *size, 3)).astype(np.float32)
    short = min(size)
    top, left = ((side - short) // 2 for side in size)
    middle = torch.tensor(picture[:, top : top + short, left : left + short].transpose(0, 3, 1, 2))
    options = {"size": (224, 224), "mode": "bicubic", "align_corners": False, "antialias": True}
    want = torch.nn.functional.interpolate(middle, **options).numpy().transpose(0, 2, 3, 1)
    want = (want - guards.CLIP_MEAN) / guards.CLIP_STD
    np.testing.assert_allclose(np.asarray(guards.to_clip(jnp.asarray(picture), 224)), want, atol=2e-5)


def test_the_blur_is_that_of_torch():
    torch = pytest.importorskip("torch")
    picture = RNG.uniform(-1, 1, (64, 72, 3)).astype(np.float32)
    places = torch.linspace(-49, 49, 99)
    kernel = torch.exp(-0.5 * (places / 100.0) ** 2)
    kernel = (kernel / kernel.sum())[:, None] @ (kernel / kernel.sum())[None]
    rows = torch.nn.functional.pad(torch.tensor(picture.transpose(2, 0, 1))[:, None], [49] * 4, mode="reflect")
    want = torch.nn.functional.conv2d(rows, kernel[None, None])[:, 0].numpy().transpose(1, 2, 0)
    mine = guards.blurred(picture)
    np.testing.assert_allclose(mine, want, atol=1e-5)
    assert mine.std() < 0.1 * picture.std()


def test_diffusers_folder_opens_and_its_network_says_the_same(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    checker_class = pytest.importorskip("diffusers.pipelines.deepfloyd_if").IFSafetyChecker
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**size, "image_size": 16, "patch_size": 8, "projection_dim": WIDTH}
    torch.manual_seed(0)
    checker = checker_class(transformers.CLIPConfig(vision_config=vision, projection_dim=WIDTH)).eval()
    checker.save_pretrained(tmp_path / "safety_checker")
    weights = read_guard(tmp_path / "safety_checker")
    pixels = RNG.normal(size=(2, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        embeds = checker.vision_model(torch.tensor(pixels.transpose(0, 3, 1, 2)))[0]
        want = [head(embeds)[:, 0].numpy() for head in (checker.p_head, checker.w_head)]
    _, mine = jax.jit(guards.CLIPVision(weights.config).apply)({"params": weights.params}, pixels)
    for word, logits in zip(("unsafe", "watermark"), want, strict=True):
        own, bias = weights.heads[word]
        np.testing.assert_allclose(np.asarray(mine) @ own + bias, logits, atol=1e-5)


def test_a_cascade_blurs_what_a_head_hides_and_only_if_asked(folder, tmp_path):
    stage = tiny.on_one_level(tiny.stages()[0])
    write_cascade(tmp_path / "cascade", [stage], tiny.DEFAULTS[:1])
    options: dict[str, Any] = {"if_I_kwargs": {"sample_timestep_respacing": "2"}}
    cascade = Cascade.load(tmp_path / "cascade")
    plain = cascade.dream("a cube", **options)
    assert plain.guarded == {}
    shown = cascade.dream("a cube", guard=SafetyGuard(folder), **options)
    assert np.array_equal(shown["I"][0], plain["I"][0]) and not shown.guarded["I"][0].hidden
    strict = tiny_clip.write(tmp_path / "strict")
    _heads(strict, -20.0, 20.0)
    hidden = cascade.dream("a cube", guard=SafetyGuard(strict), **options)
    (score,) = hidden.guarded["I"]
    assert score.hidden and score.watermark > 0.99 and score.unsafe < 0.01
    assert np.std(hidden["I"][0]) < 0.7 * np.std(plain["I"][0])
    assert isinstance(hidden["I"][0], Image.Image)


def test_weights_that_are_not_there_are_named(folder, tmp_path):
    lazy = SafetyGuard(tmp_path / "nowhere")  # nothing is read yet
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        lazy.scores(np.zeros((1, 8, 8, 3), np.float32))
    place = tiny_clip.write(tmp_path / "clip")
    with pytest.raises(FileNotFoundError, match=r"p_head_v1\.npz"):
        read_guard(place)
    for name in ("p_head_v1", "w_head_v1"):
        np.savez(place / f"{name}.npz", weights=np.zeros(768, np.float32), biases=np.float32(0))
    with pytest.raises(ValueError, match="the head 'unsafe' reads 768 features, CLIP makes 8"):
        read_guard(place)
    (place / "w_head_v1.npz").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"w_head_v1\.npz: holds no head of IF's guard"):
        read_guard(place)
