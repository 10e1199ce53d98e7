"""How long indexing takes: by processes of this machine, by heads alone, and by Beam's own runner on 1 and 2 workers.

    python tests/benchmarks/index_job.py [--pictures 20000] [--per-tar 1000] [--folder /tmp]

It writes tars of JPEGs of 512 x 400 px (300 different ones, as detailed as photographs) and indexes them anew by each
way, the command line as users call it. Beam's rows need `pip install 'if_jax[beam]'` and are left out without it. For
each: seconds, seconds of processor time of all its processes, and pictures a second. `ratio` is the time of the old way
(one process, every picture decoded) over its own. The last line is JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

WAYS = {
    "decode, 1 process": ["--workers", "1"],
    "decode, 2 processes": ["--workers", "2"],
    "headers, 1 process": ["--check", "headers", "--workers", "1"],
    "Beam, 1 worker": ["--runner", "DirectRunner", "--workers", "1"],
    "Beam, 2 workers": ["--runner", "DirectRunner", "--workers", "2"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--per-tar", type=int, default=1000)
    parser.add_argument("--folder", help="where to write [default: the system's temporary folder]")
    options = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write_tars(Path(folder), options.pictures, options.per_tar)
        for name, arguments in WAYS.items():
            if "Beam" in name and importlib.util.find_spec("apache_beam") is None:
                continue
            for path in Path(folder).glob("*.index"):
                path.unlink()
            results[name] = run([sys.executable, "-m", "if_jax", "data", "index", folder, *arguments], options.pictures)
            results[name]["ratio"] = round(next(iter(results.values()))["seconds"] / results[name]["seconds"], 2)
            print(name, json.dumps(results[name]), flush=True)
    print(json.dumps(results))


def run(command: list[str], pictures: int) -> dict[str, float]:
    began, before = time.perf_counter(), os.times()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    seconds, after = time.perf_counter() - began, os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": round(seconds, 1), "processor_s": round(spent, 1), "per_second": round(pictures / seconds)}


def write_tars(folder: Path, count: int, per_tar: int) -> None:
    rng, files = np.random.default_rng(0), []
    for _ in range(min(300, count)):
        coarse = Image.fromarray(rng.integers(0, 256, (25, 32, 3), np.uint8))
        buffer = io.BytesIO()
        coarse.resize((512, 400), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    for first in range(0, count, per_tar):
        with tarfile.open(folder / f"{first // per_tar:05d}.tar", "w") as tar:
            for number in range(first, min(first + per_tar, count)):
                for suffix, data in (("jpg", files[number % len(files)]), ("txt", b"picture %d" % number)):
                    member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


if __name__ == "__main__":
    main()
