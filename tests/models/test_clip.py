"""Flax's CLIP against transformers': random weights, both towers, and the way of a picture from its pixels on."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from PIL import Image

from if_jax.checkpoints import feature_weights
from if_jax.evaluation import features
from if_jax.models.clip import CLIPText, CLIPVision

SHAPES = {
    "openai": {"hidden_act": "quick_gelu", "eos_token_id": 2},
    "openclip": {"hidden_act": "gelu", "eos_token_id": 98},
}


@pytest.fixture(scope="module", params=SHAPES)
def released(request, tmp_path_factory):
    """A tiny CLIP with random weights, and its folder as transformers writes it."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    kind = SHAPES[request.param]
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        text_config={**size, **kind, "vocab_size": 99, "max_position_embeddings": 12, "bos_token_id": 97},
        vision_config={**size, "hidden_act": kind["hidden_act"], "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    for name, leaf in model.named_parameters():
        if leaf.ndim == 1:  # norms and biases start at one and zero, which would hide them
            leaf.data += torch.randn_like(leaf) * 0.1
        assert leaf.abs().max() > 0, name
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


def test_texts_and_pictures_have_the_features_of_transformers(released):
    torch = pytest.importorskip("torch")
    model, folder = released
    opened = feature_weights.read_clip(folder)
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 97, (3, 12))
    for row, end in enumerate((4, 11, 8)):  # behind the end mark stands what CLIP pads with
        ids[row, end:] = 98
    pictures = rng.normal(size=(3, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        text = model.text_model(input_ids=torch.tensor(ids))
        vision = model.vision_model(pixel_values=torch.tensor(pictures.transpose(0, 3, 1, 2)))
        want = [
            text.last_hidden_state,
            model.text_projection(text.pooler_output),
            vision.last_hidden_state,
            model.visual_projection(vision.pooler_output),
        ]
    (text_config, text_params), (vision_config, vision_params) = opened.text, opened.vision
    got = [
        *jax.jit(CLIPText(text_config).apply)({"params": text_params}, ids),
        *jax.jit(CLIPVision(vision_config).apply)({"params": vision_params}, pictures),
    ]
    for ours, theirs in zip(got, want, strict=True):
        theirs = theirs.numpy()
        assert np.abs(np.asarray(ours) - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("size", [(32, 32), (50, 41), (64, 200), (20, 30)])
def test_a_picture_is_prepared_as_transformers_prepares_it(size):
    transformers = pytest.importorskip("transformers")
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8)
    picture = Image.fromarray(pixels)
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    want = processor(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    got = (features.clip_pixels(picture, 32) - np.float32(feature_weights.CLIP_MEAN)) / np.float32(
        feature_weights.CLIP_STD
    )
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_other_networks_are_refused_by_name(released, tmp_path):
    _, folder = released
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    for change, match in (
        ({"model_type": "siglip"}, "of a 'siglip', not of CLIP"),
        ({"text_config": {**config["text_config"], "hidden_act": "relu"}}, "hidden_act 'relu' is not computed here"),
        ({"text_config": {**config["text_config"], "hidden_size": 36}}, r"has shape .* the configuration says"),
        ({"vision_config": {**config["vision_config"], "patch_size": 7}}, "must be a multiple of patch_size=7"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=match) as caught:
            feature_weights.read_clip(tmp_path)
        assert "\n" not in str(caught.value)
    whole = (folder / "model.safetensors").read_bytes()
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        feature_weights.read_clip(tmp_path)
