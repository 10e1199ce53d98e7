"""A tiny cascade behind an engine, and pictures to send to it."""

from __future__ import annotations

import base64
import io
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from fastapi.testclient import TestClient
from PIL import Image

from if_jax.inference.cascade import Cascade
from if_jax.serving.api import make_app
from if_jax.serving.engine import Engine
from if_jax.serving.files import PictureFiles
from if_jax.serving.guard import RequestGuard
from if_jax.serving.requests import Limits

NOTES = {"if_jax": "test", "cascade": "tiny", "dtype": "float32", "text_int8": False}
BATCH = 4


def open_cascade(folder: Path) -> Cascade:
    """The tiny cascade, written and opened."""
    return Cascade.load(tiny.write_on_one_level(folder))


@contextmanager
def running(cascade: Cascade, **options: Any) -> Iterator[Engine]:
    """An engine that is closed at the end."""
    engine = Engine(cascade, batch_size=BATCH, **options)
    try:
        yield engine
    finally:
        engine.close(60)


def client(engine: Engine, limits: Limits | None = None, **guard: Any) -> TestClient:
    """A client of the API behind its guard."""
    options = {"tokens": None, "hosts": None} | guard
    app = RequestGuard(make_app(engine, PictureFiles(NOTES, batch_size=BATCH)), limits or engine.limits, **options)
    return TestClient(app, raise_server_exceptions=False)


@contextmanager
def served(folder: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """`if-jax serve` with the tiny cascade in a process of its own: its address, when it is ready, and the process."""
    cascade, log = tiny.write_on_one_level(folder / "cascade"), folder / "log"
    (folder / "tmp").mkdir()
    command = [sys.executable, "-m", "if_jax", "serve", "--cascade", str(cascade), "--port", "0", "--batch-size", "2"]
    environment = {**os.environ, "TMPDIR": str(folder / "tmp")}
    with (
        log.open("w") as out,
        subprocess.Popen([*command, *options], stdout=out, stderr=out, env=environment) as server,
    ):
        try:
            yield _wait_until_ready(log, server), server
        finally:
            server.kill()
            server.wait()
    assert "Traceback" not in log.read_text(), log.read_text()


def _wait_until_ready(log: Path, server: subprocess.Popen) -> str:
    until = time.monotonic() + 180
    while time.monotonic() < until and server.poll() is None:
        time.sleep(0.3)
        if match := re.search(r"http://127\.0\.0\.1:\d+", log.read_text()):
            try:
                with urllib.request.urlopen(f"{match[0]}/readyz", timeout=5):
                    return match[0]
            except OSError:
                continue
    raise AssertionError(log.read_text())


def picture(width: int = 24, height: int = 16, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


def mask(width: int = 24, height: int = 16) -> Image.Image:
    made = Image.new("L", (width, height), 0)
    made.paste(255, (0, 0, width // 2, height))
    return made


def encoded(image: Image.Image, kind: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def decoded(png: str | bytes) -> np.ndarray:
    content = base64.b64decode(png) if isinstance(png, str) else png
    return np.asarray(Image.open(io.BytesIO(content)))
