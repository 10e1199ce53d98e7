"""Whether the memory of `if-jax embed` grows with the number of captions.

    python tests/benchmarks/embed_memory.py [--captions 2000 200000]

Writes a tar of that many small pictures, indexes it, and embeds its captions with an encoder of one layer in a process
of its own. Prints the resident memory of that process once the source is open, and its peak from then on (Linux).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from if_jax.data import sources


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=int, nargs="+", default=[2_000, 200_000])
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    for count in args.captions:
        with tempfile.TemporaryDirectory() as work:
            source = write_tar(Path(work) / "pictures.tar", count)
            sources.open_stored(str(source), workers=0)
            command = [sys.executable, __file__, "--measure", str(source)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            print(json.dumps({"captions": count} | json.loads(done.stdout.splitlines()[-1])), flush=True)


def measure(source: Path) -> dict[str, float]:
    """Peaks in MB and the seconds of one embedding."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import tiny

    from if_jax.checkpoints.stages import Encoders, TextEncoder
    from if_jax.data import embed
    from if_jax.data.preprocessing import Preparation
    from if_jax.parallel import rules
    from if_jax.text.tokens import load_tokenizer

    text = TextEncoder(tiny.TEXT, tiny.random_params(tiny.TEXT), load_tokenizer("bytes"), "a" * 64)
    layout = {"mesh": embed.host_mesh(), "sharding_rules": rules.PRESETS["dp"], "batch_size": 64}
    stored = sources.open_stored(str(source))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    opened, began = resident("VmRSS"), time.perf_counter()
    embed.embed(stored, Encoders(text), source.with_name("states"), form="compact", preparation=Preparation(), **layout)
    seconds = round(time.perf_counter() - began, 1)
    return {"opened_mb": opened, "embedding_mb": round(resident("VmHWM") - opened, 1), "seconds": seconds}


def resident(field: str) -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1e3


def write_tar(path: Path, count: int) -> Path:
    picture = BytesIO()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(picture, "PNG")
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            caption = f"picture number {number} of a long row of pictures".encode()
            for name, data in ((f"{number:07d}.png", picture.getvalue()), (f"{number:07d}.txt", caption)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, BytesIO(data))
    return path


if __name__ == "__main__":
    main()
