"""How much memory converting and loading a large net takes, beyond the net itself.

    python tests/benchmarks/convert_memory.py [--unet IF-I-L] [--folder DIR]

Makes a random net of the given preset in float32, converts it to DeepFloyd's layout and back, reads it onto a mesh of
four devices, and compares the weight files byte by byte. Each step runs in a process of its own, whose anonymous and
shared memory (not the pages of mapped files) is sampled every 20 ms. Needs five times the net's size on disk. The last
line is one JSON object, in GB: `model`, `largest_tensor`, the peaks, and `limit` = 1.5 + largest_tensor, which every
peak must stay below (loading: beyond the model's own arrays).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--unet", default="IF-I-L")
    parser.add_argument("--folder", type=Path, help="where the files go [default: a temporary folder]")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        run_step(given.unet, *given.step)
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as work:
        print(json.dumps(measure(given.unet, Path(work))))


def measure(unet: str, work: Path) -> dict[str, float]:
    """Runs every step in its own process and collects their figures."""
    steps = {
        "make": ["make", work / "made"],
        "to_deepfloyd": ["convert", work / "made", work / "deepfloyd", "deepfloyd"],
        "to_diffusers": ["convert", work / "deepfloyd", work / "back", "diffusers"],
        "load": ["load", work / "made"],
    }
    figures: dict[str, float] = {}
    for name, words in steps.items():
        if name == "load" and available() < 1.3 * figures["model"]:
            print(f"load          left out: {available():.1f} GB of memory are free")
            continue
        command = [sys.executable, __file__, "--unet", unet, "--step", *map(str, words)]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        figures |= {key.replace("*", name): value for key, value in json.loads(out.splitlines()[-1]).items()}
        print(f"{name:<14}" + out.splitlines()[-1], flush=True)
    one, two = (np.memmap(work / folder / WEIGHTS, np.uint8, mode="r") for folder in ("made", "back"))
    figures["limit"] = round(1.5 + figures["largest_tensor"], 3)
    done = [name for name in steps if f"peak_{name}" in figures]
    peaks = [figures[f"peak_{name}"] - figures["model"] * (name == "load") for name in done]
    return figures | {"identical": bool(np.array_equal(one, two)), "within_limit": max(peaks) <= figures["limit"]}


def available() -> float:
    """Memory that is free for a new process, GB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024 / 1e9


def run_step(unet: str, step: str, source: str, target: str = "", layout: str = "") -> None:
    """One step under observation; the last line printed is JSON."""
    import jax

    jax.config.update("jax_num_cpu_devices", 4)
    from if_jax.checkpoints import convert, release
    from if_jax.checkpoints.scheduler import SchedulerConfig
    from if_jax.checkpoints.stages import StageRelease
    from if_jax.checkpoints.tensors import Storage
    from if_jax.checkpoints.weights import abstract_params
    from if_jax.models.presets import UNETS

    config = UNETS[unet]
    sizes = [int(np.prod(leaf.shape)) * 4 for leaf in jax.tree.leaves(abstract_params(config))]
    start = time.perf_counter()
    with Watch() as watch:
        if step == "make":
            kind = "super-resolution" if config.aug_level_embedding else "base"
            release.write_stage(source, StageRelease(kind, config, random_params(config), SchedulerConfig(1.5)))
        elif step == "convert":
            convert.write_model(convert.open_model(source), target, layout, Storage(None))
        else:
            load_on_a_mesh(source)
    seconds = time.perf_counter() - start
    row = {"model": sum(sizes) / 1e9, "largest_tensor": max(sizes) / 1e9, "peak_*": watch.peak, "seconds_*": seconds}
    print(json.dumps({name: round(value, 3) for name, value in row.items()}))


def load_on_a_mesh(folder: str) -> None:
    """Read the net as the trainer does, every tensor straight to its place on four devices."""
    import jax

    from if_jax.checkpoints import release
    from if_jax.checkpoints.weights import load_params
    from if_jax.parallel.mesh import make_mesh

    mesh = make_mesh(1, 4, 1)
    stage = release.read_stage(folder, None)

    def place(leaf: Any) -> jax.sharding.NamedSharding:
        split = leaf.ndim > 1 and leaf.shape[-2] % 4 == 0
        spec = [None] * (leaf.ndim - 2) + ["fsdp", None] if split else []
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    jax.block_until_ready(load_params(stage.unet_params, "float32", jax.tree.map(place, stage.unet_params)))


def random_params(config):
    """A tree of tensors that come into being when they are written."""
    import jax

    from if_jax.checkpoints.tensors import Lazy
    from if_jax.checkpoints.weights import abstract_params

    rng = np.random.default_rng(0)

    def lazy(leaf):
        return Lazy(
            leaf.shape, np.dtype(np.float32), lambda: rng.standard_normal(leaf.shape, np.float32) * np.float32(0.02)
        )

    return jax.tree.map(lazy, abstract_params(config))


class Watch:
    """Samples this process's anonymous and shared memory; `peak` in GB, less what it had at the start."""

    def __enter__(self) -> Watch:
        self.peak, self._done, self._before = 0.0, threading.Event(), memory()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(0.02):
            self.peak = max(self.peak, memory() - self._before)


def memory() -> float:
    """RssAnon + RssShmem of this process, GB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem")) / 1e9


if __name__ == "__main__":
    main()
