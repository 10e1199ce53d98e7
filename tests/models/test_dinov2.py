"""DINOv2 against transformers', with random weights."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from if_jax.checkpoints.feature_weights import read_dinov2
from if_jax.models.dinov2 import DINOv2, resampling


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """transformers' network, and its folder. Scales and positions are random too: they begin as ones and near zero."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    net = transformers.Dinov2Model(transformers.Dinov2Config(**size, image_size=70, patch_size=14)).eval()
    for name, parameter in net.named_parameters():
        if any(word in name for word in ("lambda1", "position", "cls_token", "bias")):
            parameter.data.normal_(0.5 if "lambda1" in name else 0.0, 0.5)
    folder = tmp_path_factory.mktemp("dinov2")
    net.save_pretrained(folder)
    return net, folder


@pytest.mark.parametrize("side", [70, 56])  # as its table of positions has it, and resampled
def test_features_are_those_of_transformers(oracle, side):
    torch = pytest.importorskip("torch")
    net, folder = oracle
    pictures = np.random.default_rng(0).normal(size=(3, side, side, 3)).astype(np.float32)
    with torch.no_grad():
        want = net(torch.tensor(pictures.transpose(0, 3, 1, 2))).pooler_output.numpy()
    config, params, _ = read_dinov2(folder)
    mine = np.asarray(jax.jit(DINOv2(config).apply)({"params": params}, pictures))
    assert np.abs(mine - want).max() / np.abs(want).max() < 1e-5


def test_positions_are_resampled_as_torch_does():
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(0).normal(size=(37, 37)).astype(np.float32)
    options = {"size": (16, 16), "mode": "bicubic", "align_corners": False}
    want = torch.nn.functional.interpolate(torch.tensor(table)[None, None], **options)[0, 0].numpy()
    matrix = resampling(37, 16)
    np.testing.assert_allclose(matrix @ table @ matrix.T, want, atol=1e-5)


def test_another_network_is_refused(oracle, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        read_dinov2(tmp_path)
    config = json.loads((oracle[1] / "config.json").read_text())
    for change, message in (
        ({"model_type": "vit"}, "config.json is of a 'vit', not of DINOv2"),
        ({"use_swiglu_ffn": True}, "a feed-forward other than GELU's is not computed here"),
        ({"num_attention_heads": 3}, "must be a multiple of num_attention_heads=3"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            read_dinov2(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    (tmp_path / "model.safetensors").write_bytes((oracle[1] / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"weights do not fit the configuration: missing encoder\.layer\.2"):
        read_dinov2(tmp_path)
