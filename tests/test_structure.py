"""The layers of the package: imports go downward only, and importing it is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "if_jax"
# From the ground up; what stands in one row may import from its own row and from those before it.
LAYERS = [
    {"diffusion", "models", "scenes"},
    {"text", "parallel"},
    {"checkpoints", "data", "tracking"},
    {"config"},
    {"recipes", "inference"},
    {"training", "evaluation"},
    {"doctor"},
    {"cli_errors"},
    {"cli_draw"},
    {"cli_evaluate"},
    {"cli"},
]
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}


def _imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("if_jax"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("if_jax.")}
    return found & RANK.keys()


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downward(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if own in ("__init__", "__main__"):
        return
    upward = {name for name in _imports(path) if RANK[name] > RANK[own]}
    assert not upward, f"{own} imports {upward}, which stand above it"


def test_diffusion_knows_jax_and_numpy_only():
    for path in (ROOT / "diffusion").glob("*.py"):
        assert not _imports(path) - {"diffusion"}
        names = {
            alias.name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        assert names <= {"jax", "numpy"} | sys.stdlib_module_names, path


def test_scenes_import_nothing_else_of_the_package():
    for path in (ROOT / "scenes").glob("*.py"):
        assert _imports(path) <= {"scenes"}, path


def test_import_is_light():
    code = "import sys, if_jax; print(sorted({'jax', 'torch', 'transformers', 'tensorflow'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
