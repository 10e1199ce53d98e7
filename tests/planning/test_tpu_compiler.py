"""What the real TPU compiler says: only where libtpu is installed (pip install "if_jax[tpu]"); no TPU is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from if_jax.planning import compiling
from if_jax.planning.blocks import Block
from if_jax.planning.slices import GENERATIONS

pytestmark = [
    pytest.mark.tpu_compiler,
    pytest.mark.skipif(find_spec("libtpu") is None, reason="pip install 'if_jax[tpu]'"),
]
ROOT = Path(__file__).parents[2]
# In a process of its own, as the planner's workers are: libtpu stays in the process that has loaded it.
PRODUCT = """
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from if_jax.planning.hlo_cycles import read_cycles
from if_jax.planning.programs import one_core
from if_jax.planning.slices import GENERATIONS
for name, side in (("v5e", 8192), ("v5e", 1024), ("v6e", 1024)):
    place = SingleDeviceSharding(one_core(GENERATIONS[name]))
    a = jax.ShapeDtypeStruct((side, side), jnp.bfloat16, sharding=place)
    print("cycles", read_cycles(jax.jit(jnp.matmul).lower(a, a).compile().as_text()).total)
"""


def test_a_known_product_costs_what_it_did() -> None:
    """The canary: 8192³ in bfloat16 on v5e, 9.557 M cycles by libtpu 0.0.52, 88 % of peak."""
    environment = compiling.child_environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PRODUCT], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    cycles = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("cycles ")]
    assert cycles[0] == pytest.approx(9_557_312, rel=0.05)
    assert cycles[2] < cycles[1]  # v6e has a larger matrix unit


def test_a_block_is_compiled_and_kept(tmp_path: Path) -> None:
    sizes = {"height": 8, "width": 8, "in_channels": 3, "out_channels": 6, "features": 128, "groups": 8, "eps": 1e-5}
    block = Block("ends", 8, "train", "bfloat16", "none", tuple(sorted(sizes.items())))
    lost = Block("ends", 8, "train", "bfloat16", "none", ())  # shapes are missing
    done = compiling.figures_of([block, lost], GENERATIONS["v5e"], tmp_path, workers=1)
    assert done[block]["cycles"] > 1000 and done[block]["unestimated"] == {}
    assert sum(done[block]["by_kind"].values()) == done[block]["cycles"]
    assert "KeyError" in done[lost]["error"]
    (kept,) = tmp_path.glob("*.json")
    assert json.loads(kept.read_text()) == done[block]
