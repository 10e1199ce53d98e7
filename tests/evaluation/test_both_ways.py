"""From two folders of pictures to FID and KID, by torch-fidelity and by if_jax, with the same random weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import conftest
import fidelity
import numpy as np
import pytest
from PIL import Image

from if_jax.evaluation import measures
from if_jax.scenes import sources

ROOT = Path(__file__).parents[2]
COUNT = 2_056  # in each folder: a covariance of 2,048 features needs more pictures than that
TOGETHER = 32  # pictures whose statistics the norms of the random weights take

# torch-fidelity's own entry point. Of torchvision it needs two functions here; the rest is only imported.
THEIR_WAY = """
import json, sys, types
import numpy as np, torch

class Stub(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})

stubs = {name: Stub(name) for name in ("torchvision", "torchvision.datasets", "torchvision.transforms",
                                       "torchvision.transforms.functional")}
sys.modules.update(stubs)
transforms, functional = stubs["torchvision.transforms"], stubs["torchvision.transforms.functional"]
stubs["torchvision"].transforms, transforms.functional = transforms, functional
functional.pil_to_tensor = lambda picture: torch.tensor(np.asarray(picture)).permute(2, 0, 1)
class Compose:
    def __init__(self, parts):
        self.parts = parts
    def __call__(self, picture):
        for part in self.parts:
            picture = part(picture)
        return picture
transforms.Compose = Compose
import torch_fidelity
print(json.dumps(torch_fidelity.calculate_metrics(
    input1=sys.argv[1], input2=sys.argv[2], fid=True, kid=True, cuda=False, cache=False, verbose=False, batch_size=32,
    feature_extractor_weights_path=sys.argv[3], save_cpu_ram=True, kid_subset_size=int(sys.argv[4]),
)))
"""

OUR_WAY = """
import json, sys
from if_jax.evaluation import captioned, measures
from if_jax.evaluation.features import open_network
from if_jax.evaluation.reference import read_reference
networks = {"inception": open_network("inception", sys.argv[3])}
drawn, true = (read_reference(folder, networks) for folder in sys.argv[1:3])
measures.KID_SUBSET_SIZE = int(sys.argv[4])
print(json.dumps(captioned.measure(drawn.features, true, networks)["inception"]))
"""


@pytest.mark.slow  # 4,112 pictures through Inception-v3 twice: half an hour of a core
def test_both_whole_ways_lead_to_the_same_fid_and_kid(tmp_path):
    for folder, source in (("drawn", "tasks"), ("true", "scenes")):
        (tmp_path / folder).mkdir()
        for start in range(0, COUNT, 64):
            rows = range(start, min(start + 64, COUNT))
            for number, (picture, _, _) in zip(rows, sources.draw(source, rows, 5, 64), strict=True):
                Image.fromarray(picture).save(tmp_path / folder / f"{number:05d}.png")
    some = [Image.open(path) for path in sorted((tmp_path / "true").glob("*.png"))[:TOGETHER]]
    fidelity.random_inception(tmp_path / "random.pth", np.stack([np.asarray(picture) for picture in some]))
    size = min(measures.KID_SUBSET_SIZE, COUNT)
    words = [str(tmp_path / name) for name in ("drawn", "true", "random.pth")] + [str(size)]
    began = time.monotonic()
    want = _result(THEIR_WAY, words, str(conftest.ASSETS))
    middle = time.monotonic()
    got = _result(OUR_WAY, words, str(ROOT))
    print(f"theirs {middle - began:.0f} s, ours {time.monotonic() - middle:.0f} s for {2 * COUNT} pictures")
    mean, deviation = (want[f"kernel_inception_distance_{part}"] for part in ("mean", "std"))
    print(f"FID {got.get('fid')} against {want['frechet_inception_distance']}")
    print(f"KID {got['kid']} against {mean} ± {deviation}")
    assert (got["kid"]["value"], got["kid"]["deviation"]) == pytest.approx((mean, deviation), rel=1e-3, abs=1e-6)
    assert got["fid"]["value"] == pytest.approx(want["frechet_inception_distance"], rel=1e-3)


def _result(program, words, path):
    """What a program prints last, in a process of its own: this one's programs are compiled to be compiled fast."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run([sys.executable, "-c", program, *words], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])
