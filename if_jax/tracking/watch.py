"""A run watched from a notebook: its loss curve and its newest pictures, renewed in place while it trains."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image


@contextmanager
def watch(workdir: str | Path, seconds: float = 10.0) -> Iterator[None]:
    """Shows `draw_run(workdir)` below the cell and renews it while the block runs, and once after.

    The block trains in the cell's own thread, so that stopping the cell stops it; what draws runs beside it.

    Args:
      workdir: folder of the run.
      seconds: between two looks at it.
    """
    from IPython.display import DisplayHandle

    seen = _newest(workdir)
    cell = DisplayHandle()
    cell.display(draw_run(workdir))
    ended = threading.Event()

    def renew() -> None:
        nonlocal seen
        while not ended.wait(seconds):
            if (now := _newest(workdir)) != seen:  # a compilation takes longer: draw nothing twice
                seen = now
                cell.update(draw_run(workdir))

    drawing = threading.Thread(target=renew, daemon=True, name="watch")
    drawing.start()
    try:
        yield
    finally:
        ended.set()
        drawing.join()
        cell.update(draw_run(workdir))


def draw_run(workdir: str | Path) -> Image.Image:
    """The loss of `metrics.jsonl` over the steps, beside the newest sheet of `samples/`; empty where there is none."""
    from matplotlib.figure import Figure  # no pyplot: it belongs to the cell's thread

    figure = Figure(figsize=(10, 4), layout="constrained")
    curve, sheet = figure.subplots(1, 2)
    rows = [row for row in read_rows(Path(workdir) / "metrics.jsonl") if "loss" in row]
    curve.set(xlabel="step", ylabel="loss", title="no step is logged yet")
    if rows:
        curve.plot([row["step"] for row in rows], [row["loss"] for row in rows])
        curve.set(title=f"step {rows[-1]['step']}: loss {rows[-1]['loss']:.4f}")
    sheet.axis("off")
    newest = _newest(workdir)[1]
    if newest is not None and (picture := _opened(newest)) is not None:
        sheet.imshow(picture)
        sheet.set_title(f"step {int(newest.stem.rpartition('-')[2])}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer, formats=("PNG",))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file that are whole: the last one may just be being written."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _newest(workdir: str | Path) -> tuple[int, Path | None]:
    """What there is to draw: the length of the metrics, and the newest sheet."""
    metrics, sheets = Path(workdir) / "metrics.jsonl", (Path(workdir) / "samples").glob("*-*.png")
    return metrics.stat().st_size if metrics.is_file() else 0, max(sheets, default=None)  # seven digits: the last step


def _opened(path: Path) -> Image.Image | None:
    """The picture, or None where it is still being written."""
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            return picture.convert("RGB")
    except OSError:
        return None
