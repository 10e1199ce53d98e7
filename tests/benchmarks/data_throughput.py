"""How fast stored pictures reach training, beside Pillow alone on the same bytes, and how fast scenes are drawn.

    python tests/benchmarks/data_throughput.py [--source PATH] [--sizes 64 256] [--seconds 5]
    python tests/benchmarks/data_throughput.py --bucket [--delay 0.02]
    python tests/benchmarks/data_throughput.py --bucket --train [--steps 12]

Without --source it writes 300 JPEGs of 512 x 400 px into a tar and reads those. Prints, for one core: Pillow decoding
each file (the ceiling), decoding, cutting and scaling it, and whole batches from `pipeline.batches`, with the share of
the ceiling that is left. Last, scenes and tasks drawn by the ray caster, by one core too or by an accelerator.

With --bucket it reads the same tar from the disk and from a bucket on localhost that takes --delay seconds to answer,
without a cache, and prints batches a second of both (of a core's time: `_cpu`), with the share that is left.
With --train it trains the demo's stage I on that bucket instead, and prints the share of the time that waits for input.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from if_jax.data import pipeline, sources
from if_jax.data.preprocessing import fit, read_picture
from if_jax.data.remote import RemoteSettings
from if_jax.scenes import raycast, sampling, tasks
from if_jax.text.tokens import load_tokenizer

BATCH, TURNS = 16, 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--bucket", action="store_true")
    parser.add_argument("--delay", type=float, default=0.02)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.delay)
        return
    if args.bucket and args.train:
        print(json.dumps(training_waits(args.delay, args.steps)))
        return
    if args.bucket:
        print(json.dumps(bucket_share(args.sizes[0], args.delay, args.seconds)))
        return
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core, whatever runs in threads
    with tempfile.TemporaryDirectory() as work:
        source = args.source or str(write_tar(Path(work) / "pictures.tar"))
        stored = sources.open_stored(source)
        files = [stored[number].picture for number in range(min(len(stored), 300))]
        ceiling = rate(lambda: map(decode, itertools.cycle(files)), args.seconds)
        print(json.dumps({"pictures": len(stored), "decode_per_second": round(ceiling, 1)}))
        for size in args.sizes:
            alone = rate(lambda s=size: (fit(read_picture(file), s) for file in itertools.cycle(files)), args.seconds)
            whole = BATCH * rate(lambda s=size: batches(source, s), args.seconds)
            shares = {"prepare_share": round(alone / ceiling, 3), "batches_share": round(whole / ceiling, 3)}
            rates = {"prepare_per_second": round(alone, 1), "batches_per_second": round(whole, 1)}
            print(json.dumps({"size": size, **rates, **shares}))
    for name, size in itertools.product(("scenes", "tasks"), args.sizes):
        print(json.dumps({"drawn": name, "size": size, "per_second": round(drawing_rate(name, size, args.seconds), 1)}))


def batches(source: str, size: int, **options: object) -> Iterator[dict[str, np.ndarray]]:
    tokenize = load_tokenizer("bytes")
    return pipeline.batches(source, size=size, batch_size=BATCH, seed=0, tokenize=tokenize, **{"threads": 1} | options)


def bucket_share(size: int, delay: float, seconds: float) -> dict[str, float]:
    """Batches a second from a disk and, in turns, from a bucket in a process of its own; two threads.

    The reader has one core in both cases and the bucket has the others, since no host is its own bucket. Of wall time,
    and of the reader's time on a core, which other programs disturb less.
    """
    options = {"threads": 2, "settings": RemoteSettings(cache_size="0B")}
    with tempfile.TemporaryDirectory() as work:
        tar = write_tar(Path(work) / "pictures.tar")
        rates: dict[str, list[float]] = {"disk": [], "bucket": [], "disk_cpu": [], "bucket_cpu": []}
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else set()
        with served(tar, delay, without=min(cores) if len(cores) > 1 else None) as address:
            if len(cores) > 1:
                os.sched_setaffinity(0, {min(cores)})
            for turn in range(TURNS):
                both = [("disk", str(tar)), ("bucket", address)]
                for where, source in both if turn % 2 else reversed(both):
                    before, used = time.perf_counter(), time.process_time()
                    rates[where].append(rate(lambda s=source: batches(s, size, **options), seconds, time.perf_counter))
                    share = (time.process_time() - used) / (time.perf_counter() - before)
                    rates[f"{where}_cpu"].append(rates[where][-1] / share)
    result = {name: statistics.median(values) for name, values in rates.items()}
    for name, end in (("bucket_share", ""), ("bucket_share_of_core_time", "_cpu")):
        turns = zip(rates[f"bucket{end}"], rates[f"disk{end}"], strict=True)
        result[name] = statistics.median(bucket / disk for bucket, disk in turns)  # the machine's own speed varies
    return {"delay_s": delay, **{name: round(value, 3) for name, value in result.items()}}


def training_waits(delay: float, steps: int) -> dict[str, float]:
    """The demo's stage I, batch 16 at 64 px, on a bucket: medians of its metrics, those of the first steps left out."""
    root = Path(__file__).parents[2]
    keys = {"batch_size": BATCH, "steps": steps, "log_every": 2, "sample.every": 0, "validation.every": 0}
    keys |= {"data.remote.cache_size": "0B", "checkpoint_every": steps}
    with tempfile.TemporaryDirectory() as work, served(write_tar(Path(work) / "pictures.tar"), delay) as address:
        words = [f"--config.{name}={value}" for name, value in (keys | {"data.source": address}).items()]
        command = [sys.executable, "-m", "if_jax", "train", "--config", root / "configs/demo_base.py", *words]
        subprocess.run([*command, "--workdir", f"{work}/run"], check=True, stdout=sys.stderr)
        rows = [json.loads(line) for line in Path(work, "run/metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "input_wait_share" in row][1:]
    names = ("input_wait_share", "step_seconds", "images_per_second")
    return {name: statistics.median(row[name] for row in rows) for name in names}


@contextmanager
def served(tar: Path, delay: float, without: int | None = None) -> Iterator[str]:
    """The address of a tar in a bucket that another process serves, on any core but `without`."""
    command = [sys.executable, __file__, "--serve", str(tar), "--delay", str(delay)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        if without is not None:
            os.sched_setaffinity(server.pid, os.sched_getaffinity(0) - {without})
        os.environ.update(json.loads(server.stdout.readline()))
        yield f"gs://bucket/{tar.name}"
        server.stdin.close()


def serve(tar: Path, delay: float) -> None:
    """Serves a tar until standard input ends."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import bucket

    with bucket.serve() as (far, variables):
        far.put(tar.name, tar.read_bytes())
        far.delay = delay
        print(json.dumps(variables), flush=True)
        sys.stdin.read()


def drawing_rate(name: str, size: int, seconds: float) -> float:
    """Pictures a second without captions, on the device that JAX finds."""
    on_cpu = jax.default_backend() == "cpu"
    chunk = max(1, (2**18 if on_cpu else 2**24) // size**2)
    clock = time.process_time if on_cpu else time.perf_counter

    def pictures() -> Iterator[jax.Array]:
        for first in itertools.count(0, chunk):
            numbers = np.arange(first, first + chunk)
            batch = sampling.sample_scenes(numbers, 0) if name == "scenes" else tasks.sample_tasks(numbers, 0)[0]
            yield raycast.render_scenes(batch, size).block_until_ready()

    return chunk * rate(pictures, seconds, clock)


def decode(file: bytes) -> Image.Image:
    with Image.open(io.BytesIO(file)) as stored:
        return stored.convert("RGB")


def rate(make: Callable[[], Iterator], seconds: float, clock: Callable[[], float] = time.process_time) -> float:
    """Items a second, the first few not counted."""
    items = iter(make())
    for _ in range(2):
        next(items)
    began, count = clock(), 0  # time of this process alone where one can: other programs may share the core
    while clock() - began < seconds:
        next(items)
        count += 1
    return count / (clock() - began)


def write_tar(path: Path) -> Path:
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for number in range(300):
            coarse = Image.fromarray(rng.integers(0, 256, (25, 32, 3), np.uint8))  # about as detailed as a photograph
            picture = coarse.resize((512, 400), Image.Resampling.BICUBIC)
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=90)
            for name, data in ((f"{number:04d}.jpg", buffer.getvalue()), (f"{number:04d}.txt", b"a picture")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


if __name__ == "__main__":
    main()
