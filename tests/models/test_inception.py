"""FID's Inception-v3 against torch-fidelity's, with random weights whose norms know the pictures."""

from __future__ import annotations

import hashlib

import fidelity
import jax
import numpy as np
import pytest

from if_jax.checkpoints import feature_weights
from if_jax.models.inception import Inception, enlarge


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """torch-fidelity's network, and the file of its weights."""
    pytest.importorskip("torch")
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    return fidelity.random_inception(path, _pictures(4, 64)), path


def _pictures(count, side):
    rng = np.random.default_rng(count)
    coarse = rng.integers(0, 256, (count, side // 8, side // 8, 3))
    return np.clip(coarse.repeat(8, 1).repeat(8, 2) + rng.integers(-20, 21, (count, side, side, 3)), 0, 255).astype(
        np.uint8
    )


def test_features_are_those_of_torch_fidelity(oracle):
    torch = pytest.importorskip("torch")
    extractor, path = oracle
    params, digest = feature_weights.read_inception(path)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    apply = jax.jit(Inception().apply)
    pictures = _pictures(3, 64)
    with torch.no_grad():
        want = extractor(torch.tensor(pictures.transpose(0, 3, 1, 2)))[0].numpy()
    got = np.asarray(apply({"params": params}, pictures))
    extractor.feature_extractor_internal_dtype = torch.float64
    exact = extractor.double()(torch.tensor(pictures.transpose(0, 3, 1, 2)))[0].numpy()
    assert want.std(0).mean() > 1e-2 * want.mean()  # the pictures are told apart
    # Random norms make much of rounding: PyTorch's own float32 is 5e-5 from its float64.
    assert _error(got, exact) <= 1.5 * _error(want, exact) <= 2e-4


def _error(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_pictures_are_enlarged_by_the_rule_of_tensorflow_1():
    torch = pytest.importorskip("torch")
    resize = fidelity.inception_module().interpolate_bilinear_2d_like_tensorflow1x
    for side in (17, 64, 299, 400):
        pictures = _pictures(2, 8 * (side // 8) + 8)[:, :side, :side]
        want = resize(torch.tensor(pictures.transpose(0, 3, 1, 2)).float(), (299, 299), align_corners=False)
        np.testing.assert_allclose(enlarge(pictures, 299), want.numpy().transpose(0, 2, 3, 1), atol=1e-4)


def test_a_file_that_is_not_what_its_name_says_is_refused(oracle, tmp_path):
    _, path = oracle
    renamed = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    renamed.write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="its name says 6726825d: damaged"):
        feature_weights.read_inception(renamed)
    with pytest.raises(FileNotFoundError, match="lacks this file"):
        feature_weights.read_inception(tmp_path / "nothing.pth")
