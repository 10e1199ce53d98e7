"""torch-fidelity as an oracle: its modules one by one, without its package, which imports torchvision."""

from __future__ import annotations

import types

import conftest
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
