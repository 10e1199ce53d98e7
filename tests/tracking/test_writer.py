"""The metrics file after an interruption: what comes again is dropped, what was cut short as well."""

from __future__ import annotations

import json

from PIL import Image

from if_jax.tracking.writer import MetricWriter


def test_lines_after_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": step, "loss": 1 / 3}) for step in (1, 2, 3)]
    path.write_text("\n".join([*rows, '{"step": 4, "lo']))
    writer = MetricWriter(str(tmp_path), start_step=2)
    writer.scalars(3, {"loss": 0.1})
    writer.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 1 / 3},
        {"step": 2, "loss": 1 / 3},
        {"step": 3, "loss": 0.1},
    ]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_pictures_are_numbered_by_step(tmp_path):
    writer = MetricWriter(str(tmp_path), start_step=0)
    writer.picture(20, "samples", Image.new("RGB", (4, 4)))
    writer.close()
    assert (tmp_path / "samples" / "samples-0000020.png").is_file()
