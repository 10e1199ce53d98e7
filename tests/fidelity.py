"""torch-fidelity as an oracle: its modules one by one, without its package, which imports torchvision."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import conftest
import numpy as np
import pytest


def package() -> types.ModuleType:
    """The bare package, for `sys.modules`; the test is skipped where `tests/fetch_assets.py` has not fetched it."""
    pytest.importorskip("torch")
    folder = conftest.ASSETS / "torch_fidelity"
    if not folder.is_dir():
        pytest.skip("torch-fidelity is not there: python tests/fetch_assets.py")
    bare = types.ModuleType("torch_fidelity")
    bare.__path__ = [str(folder)]
    return bare


def inception_module() -> types.ModuleType:
    """torch-fidelity's module of FID's network."""
    sys.modules.setdefault("torch_fidelity", package())
    return importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")


def random_inception(path: Path, pictures: np.ndarray) -> Any:
    """torch-fidelity's network with random weights, in the file too.

    They alone give all pictures the same features; so its norms take the statistics of `pictures` (B, H, W, 3) first.
    """
    import torch

    network = inception_module()
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:  # its constructor opens a file: this one is as it starts
        patch.setattr(torch, "load", lambda path, **options: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda self, state: None)
        extractor = network.FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path="random")
    for norm in (module for module in extractor.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        norm.momentum = None  # a plain mean over what it sees
        norm.weight.data.uniform_(0.5, 1.5)
        norm.bias.data.normal_(0, 0.2)
    extractor.train()
    extractor(torch.tensor(pictures.transpose(0, 3, 1, 2)))
    extractor.eval()
    torch.save(extractor.state_dict(), path)
    return extractor
