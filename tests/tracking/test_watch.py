"""What a notebook shows of a run, at every moment of it; tests/launch/test_notebooks.py has it in a kernel."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from if_jax.tracking.watch import draw_run, read_rows

pytest.importorskip("matplotlib")


def same(left: Image.Image, right: Image.Image) -> bool:
    return np.array_equal(np.asarray(left), np.asarray(right))


def test_a_run_is_drawn_from_its_beginning_on(tmp_path):
    run = tmp_path / "run"
    empty = draw_run(run)  # no folder yet
    run.mkdir()
    rows = [json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in (10, 20, 30)]
    (run / "metrics.jsonl").write_text("".join(rows) + '{"step": 40, "lo')  # being written
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [10, 20, 30]
    curve = draw_run(run)
    assert curve.size == empty.size and not same(curve, empty)
    (run / "samples").mkdir()
    Image.effect_noise((64, 64), 90).convert("RGB").save(run / "samples/samples-0000020.png")
    (run / "samples/samples-0000030.png").write_bytes(b"\x89PNG")  # being written
    assert same(draw_run(run), curve)
    (run / "samples/samples-0000030.png").unlink()
    assert not same(draw_run(run), curve)
