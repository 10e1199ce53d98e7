"""Compiled blocks' figures: from a cache on disk, or made by child processes, which a crash of the compiler may end."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from if_jax.checkpoints.files import atomic_file, user_cache
from if_jax.planning.blocks import Block
from if_jax.planning.slices import Generation
from if_jax.planning.worker import MARK

CALIBRATED = "0.0.52"  # the libtpu that docs/plan.md compares with published times
WORKERS = 2
COMMAND = [sys.executable, "-m", "if_jax.planning.worker"]
_PACKAGE = Path(__file__).parents[1]
_SOURCES = ("models/layers.py", "models/blocks.py", "models/t5.py", "planning/programs.py", "planning/hlo_cycles.py")
_ENVIRONMENT = ("LIBTPU_INIT_ARGS",)
_TIMEOUT = 1800.0  # seconds for one block
_TICK = 10.0  # seconds between two signs of life
# Without a TPU: no question to the cloud's metadata, and no lock that only one process may hold.
_CHILD = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

Figures = Mapping[str, Any]  # of `compile_block`, or {"error"}
Progress = Callable[[Block, Figures, float, int], None]  # block, figures, seconds left, blocks left


def libtpu_version() -> str:
    """Of the installed libtpu.

    Raises:
      ValueError: there is none, or it does not run here.
    """
    machine = (sys.platform, os.uname().machine if hasattr(os, "uname") else "")
    if machine != ("linux", "x86_64"):
        raise ValueError(f"plan needs the TPU compiler, which runs on Linux x86_64 alone, not on {' '.join(machine)}")
    try:
        return metadata.version("libtpu")
    except metadata.PackageNotFoundError:
        raise ValueError("plan needs the TPU compiler (no TPU): pip install 'if_jax[tpu]'") from None


def cache_folder() -> Path | None:
    """Where figures are kept; None where there is no home."""
    cache = user_cache()
    return cache / "plan" if cache else None


def key_of(block: Block | Mapping[str, Any], generation: Generation, libtpu: str) -> str:
    """The name of a block's figures in the cache: a hash of all that they follow from.

    Args:
      block: which, or the request for a whole step.
      generation: of the chip.
      libtpu: its version.
    """
    asked = dataclasses.asdict(block) if isinstance(block, Block) else block
    parts = [asked, generation.name, libtpu, metadata.version("jax"), _sources_hash()]
    parts += [os.environ.get(name) for name in _ENVIRONMENT]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def read_cache(folder: Path | None, key: str) -> Figures | None:
    """Figures that were kept; None where there are none, or none that can be read."""
    try:
        return json.loads((folder / f"{key}.json").read_text(encoding="utf-8")) if folder else None
    except (OSError, ValueError):
        return None


def figures_of(
    blocks: Iterable[Block],
    generation: Generation,
    folder: Path | None,
    progress: Progress | None = None,
    workers: int = WORKERS,
    timeout: float = _TIMEOUT,
) -> dict[Block, Figures]:
    """The figures of each block; what is not in the cache is compiled, and kept there as it comes.

    Args:
      blocks: which.
      generation: of the chip.
      folder: of the cache; None: nothing is kept.
      progress: called after each block that was compiled.
      workers: child processes at the same time.
      timeout: seconds that one block may take.

    Returns:
      By block, its figures, or {"error": one line}.
    """
    libtpu = libtpu_version()
    keys = {block: key_of(block, generation, libtpu) for block in blocks}
    done: dict[Block, Figures] = {}
    for block, key in keys.items():
        if (kept := read_cache(folder, key)) is not None:
            done[block] = kept
    missing = sorted(keys.keys() - done.keys(), key=_expected_seconds, reverse=True)
    if not missing:
        return done
    began, lock = time.monotonic(), threading.Lock()
    waiting: queue.SimpleQueue[Block] = queue.SimpleQueue()
    for block in missing:
        waiting.put(block)

    def compile_many() -> None:
        with _Child(timeout) as child:
            while True:
                try:
                    block = waiting.get_nowait()
                except queue.Empty:
                    return
                figures = child.ask({"block": dataclasses.asdict(block), "generation": generation.name})
                with lock:
                    done[block] = figures
                    keep(folder, keys[block], figures)
                    if progress:
                        left = [other for other in missing if other not in done]
                        rate = (time.monotonic() - began) / sum(_expected_seconds(b) for b in missing if b in done)
                        progress(block, figures, rate * sum(map(_expected_seconds, left)), len(left))

    threads = [threading.Thread(target=compile_many) for _ in range(min(workers, len(missing)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done


def ask_alone(request: Mapping[str, Any], tick: Callable[[float], None], timeout: float) -> Figures:
    """The answer of a child process of its own to one request.

    Args:
      request: as `if_jax.planning.worker` reads it.
      tick: called now and then with the seconds that have passed.
      timeout: seconds that it may take.
    """
    done, began = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(_TICK):
            tick(time.monotonic() - began)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        with _Child(timeout) as child:
            return child.ask(request)
    finally:
        done.set()
        teller.join()


def child_environment() -> dict[str, str]:
    """This process's, as the TPU compiler wants it: it ends over words of XLA_FLAGS that are for other machines."""
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | _CHILD


class _Child:
    """A compiling process, started when it is first asked, and again after it has ended."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.process: subprocess.Popen[str] | None = None
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed on exit)

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self.log.close()

    def ask(self, request: Mapping[str, Any]) -> Figures:
        """The answer to one request, or {"error"} where the process ended over it."""
        process = self.process or self._start()
        assert process.stdin and process.stdout
        late = threading.Timer(self.timeout, process.kill)
        late.start()
        try:
            print(json.dumps(request), file=process.stdin, flush=True)
            for line in process.stdout:
                if line.startswith(MARK):
                    return json.loads(line.removeprefix(MARK))
        except BrokenPipeError:
            pass
        finally:
            timed_out = late.finished.is_set()
            late.cancel()
        code = process.wait()
        self._end()
        if timed_out:
            return {"error": f"the compiler had not finished after {self.timeout:.0f} seconds"}
        return {"error": f"the compiler crashed (exit code {code}): {self._last_words()}"}

    def _start(self) -> subprocess.Popen[str]:
        path = os.pathsep.join(filter(None, (str(_PACKAGE.parent), os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=child_environment() | {"PYTHONPATH": path},
        )
        return self.process

    def _end(self) -> None:
        if self.process is None:
            return
        for stream in (self.process.stdin, self.process.stdout):
            if stream:
                stream.close()
        self.process.kill()
        self.process.wait()
        self.process = None

    def _last_words(self) -> str:
        """What the compiler said that was wrong, of all it has written."""
        self.log.seek(0)
        lines = [line.strip() for line in self.log.read().splitlines() if line.strip()]
        telling = [line for line in lines if any(word in line for word in ("Error", "CHECK", "RET_CHECK", "Fatal"))]
        return (telling or lines or ["it wrote nothing"])[-1][:200]


def _expected_seconds(block: Block) -> float:
    """Rough: more products, and gradients of them, take longer to compile."""
    products = {"residual": 2, "attention": 4, "embedding": 3, "ends": 1, "text": 3}[block.kind]
    return products * (1 if block.work == "forward" else 3)


def keep(folder: Path | None, key: str, figures: Figures) -> None:
    """Keeps figures in the cache; those of a failure are not kept.

    Args:
      folder: of the cache; None: nowhere.
      key: see `key_of`.
      figures: of a block.
    """
    if folder is None or "error" in figures:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / f"{key}.json") as beside:
            beside.write_text(json.dumps(figures), encoding="utf-8")
    except OSError:  # a full disk, a home that cannot be written: it is compiled again next time
        pass


def _sources_hash() -> str:
    """Of the code that a block's program and its figures come from."""
    return hashlib.sha256(b"\0".join((_PACKAGE / name).read_bytes() for name in _SOURCES)).hexdigest()
