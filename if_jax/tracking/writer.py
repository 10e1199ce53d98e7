"""One writer for a run's numbers and pictures: JSON lines and TensorBoard, on process 0."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from PIL import Image


class MetricWriter:
    """Writes `WORKDIR/metrics.jsonl`, `WORKDIR/tensorboard/` and `WORKDIR/samples/`; silent on other processes.

    A run that resumes at `start_step` first drops the lines written after it: they are about to be written again.
    """

    def __init__(self, workdir: str, start_step: int) -> None:
        self._active = jax.process_index() == 0
        if not self._active:
            return
        from tensorboardX import SummaryWriter

        self._root = Path(workdir)
        self._root.mkdir(parents=True, exist_ok=True)
        path = self._root / "metrics.jsonl"
        _drop_lines_after(path, start_step)
        self._lines = path.open("a", buffering=1)
        self._board = SummaryWriter(str(self._root / "tensorboard"), purge_step=start_step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line; floats are written with all their digits, so that two runs can be compared bit for bit."""
        if not self._active:
            return
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """Saves a picture as `samples/NAME-STEP.png` and to TensorBoard."""
        if not self._active:
            return
        folder = self._root / "samples"
        folder.mkdir(exist_ok=True)
        image.save(folder / f"{name}-{step:07d}.png")
        self._board.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        """Flushes and closes both files."""
        if self._active:
            self._lines.close()
            self._board.close()


def _drop_lines_after(path: Path, step: int) -> None:
    """Keeps the lines up to `step`; a last line that a kill cut short is dropped as well."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue
    beside = path.with_suffix(".partial")
    beside.write_text("".join(kept))
    os.replace(beside, path)
