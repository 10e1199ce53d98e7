"""How opening a source grows with its records: a synthetic index of tars, at one, ten and a hundred million.

    python tests/benchmarks/data_scale.py [--records 1000000 10000000 100000000] [--parts 10000] [--folder /tmp]

Each part is a tar with one real picture, and an index of as many rows as such a shard would have, which all lead to
that picture. A hundred million records take 8 GB below --folder, which are removed at the end. Nothing is in the page
cache when a source is opened. Every step runs in a process of its own:

    filter_s       the first opening: all columns read, the rows that pass a filter (about half) worked out and kept
    open_s         any later opening, by the same filter
    lookup_us      from a random record's number to its key and place: half of 2,000 take less
    lookup_us_99   99 % of them take less
    first_batch_s  from an opened source to 256 prepared pictures of 64 px
    rss_mb         resident memory of that process at the end, with all libraries that training imports
    rss_grown_mb   of that, what opening, looking up and the batch have added

The last line is JSON: these for each number of records.
"""

from __future__ import annotations

import argparse
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

from if_jax.data import pipeline
from if_jax.data.index import Filter
from if_jax.data.index_part import FACTS, SUFFIX, Head, make_columns, write_part
from if_jax.data.preprocessing import Preparation
from if_jax.data.records import hash_files
from if_jax.data.samples import StoredPictures
from if_jax.data.sources import open_stored
from if_jax.data.tars import Tar
from if_jax.text.tokens import load_tokenizer

KEEP = Filter(min_side=512, max_watermark=0.9)
LOOKUPS, BATCH, SIZE = 2000, 256, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[10**6, 10**7, 10**8])
    parser.add_argument("--parts", type=int, default=10_000, help="at most; a part has 1,000 records or more")
    parser.add_argument("--folder", help="where to write [default: the system's temporary folder]")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    results = {}
    for records in options.records:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            parts = max(1, min(options.parts, records // 1000))
            began = time.perf_counter()
            size = write_source(Path(folder), records, parts)
            print(f"{records:,} records in {parts:,} parts, {size / 1e9:.2f} GB: {time.perf_counter() - began:.0f} s")
            first = child(folder)
            again = child(folder)
            results[records] = {"parts": parts, "filter_s": first["open_s"], **again}
            print(json.dumps(results[records]), flush=True)
    print(json.dumps(results))


def write_source(folder: Path, records: int, parts: int) -> int:
    """Writes tars and their index; returns the bytes of the index."""
    rng, size = np.random.default_rng(0), 0
    picture = Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG")
    stored = io.BytesIO()
    with tarfile.open(fileobj=stored, mode="w") as tar:
        for name, data in (("0.jpg", buffer.getvalue()), ("0.txt", b"a picture")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    place: tuple[int, ...] = ()
    for number, rows in enumerate(np.array_split(np.arange(records), parts)):
        path = folder / f"{number:05d}.tar"
        path.write_bytes(stored.getvalue())
        store = Tar(path)
        if not number:
            place = next(iter(store.scan()))[1]
        facts = np.zeros(len(rows), FACTS)
        facts["width"], facts["height"] = rng.integers(256, 2048, (2, len(rows)))
        facts["caption"] = rng.integers(5, 200, len(rows))
        facts["clip"], facts["watermark"], facts["aesthetic"] = rng.random((3, len(rows)), np.float32)
        facts["content"] = rng.integers(0, 2**63, len(rows))
        keys = [b"%05d%04d" % (number, row) for row in range(len(rows))]
        columns = make_columns(keys, np.tile(np.array(place), (len(rows), 1)), facts)
        index = path.with_name(path.name + SUFFIX)
        head = Head(store.fingerprint(), hash_files(store), len(rows), f"{number:032x}", ("",))
        write_part(str(index), head, columns)
        size += index.stat().st_size
    return size


def child(folder: str) -> dict[str, float]:
    """`measure` in a fresh process, nothing of the source in the page cache."""
    os.sync()
    for path in Path(folder).rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, "--measure", folder]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.splitlines()[-1])


def measure(folder: str) -> dict[str, float]:
    tokenize, before = load_tokenizer("bytes"), resident_mb()
    began = time.perf_counter()
    stored = open_stored(folder, KEEP)
    opened = time.perf_counter() - began
    times = []
    for number in np.random.default_rng(1).integers(0, len(stored), LOOKUPS).tolist():
        began = time.perf_counter()
        store, row = stored.place(number)
        _ = stored.indexes[store].key(row), stored.indexes[store].columns.places[row].tolist()
        times.append(1e6 * (time.perf_counter() - began))
    began = time.perf_counter()
    source = StoredPictures(stored, SIZE, 0, Preparation())
    next(pipeline.batches(source, size=SIZE, batch_size=BATCH, seed=0, tokenize=tokenize))
    return {
        "used": len(stored),
        "open_s": round(opened, 2),
        "lookup_us": round(float(np.median(times))),
        "lookup_us_99": round(float(np.quantile(times, 0.99))),
        "first_batch_s": round(time.perf_counter() - began, 2),
        "rss_mb": round(resident_mb()),
        "rss_grown_mb": round(resident_mb() - before),
    }


def resident_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


if __name__ == "__main__":
    main()
