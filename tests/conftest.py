"""Every test runs on the CPU, with eight fake devices, so that a mesh is a mesh."""

import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Machine code as it comes: most of the time goes into compiling programs that run a few times on tiny nets.
os.environ["XLA_FLAGS"] = " ".join(
    (
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
        # The older emitters compile faster; versions from 0.11 on have none, and stop at the word.
        *(["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib") < "0.11" else []),
    )
)

import jax

jax.config.update("jax_num_cpu_devices", 8)
# Programs that several tests compile alike are compiled once per session.
_CACHE = tempfile.TemporaryDirectory(prefix="if_jax_tests_", ignore_cleanup_errors=True)
jax.config.update("jax_compilation_cache_dir", _CACHE.name)

# What tests/fetch_assets.py fetches, among it the original IF as an importable package.
ASSETS = Path(os.environ.get("IF_JAX_TEST_ASSETS", Path(__file__).parent.parent / ".assets"))
sys.path.append(str(ASSETS))

# Files are dealt to the workers whole: the longest come first, so that no worker is left alone with one at the end.
LONGEST = ("training/test_loop.py", "training/test_step.py", "inference/test_parity.py")


def pytest_collection_modifyitems(items):
    def place(item):
        return next((i for i, name in enumerate(LONGEST) if item.path.as_posix().endswith(name)), len(LONGEST))

    items.sort(key=place)
