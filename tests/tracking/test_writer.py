"""Where a run's numbers and pictures go: JSON lines, TensorBoard, Weights & Biases; and what an interruption leaves."""

from __future__ import annotations

import io
import json
import struct
import sys

import numpy as np
import pytest
from PIL import Image
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event

from if_jax.tracking.mirror import Mirror
from if_jax.tracking.writer import MetricWriter

RED = Image.new("RGB", (4, 3), (255, 0, 0))
BLUE = Image.new("RGB", (4, 3), (0, 0, 255))


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
    writer.pictures(20, "samples", RED, {"a cube": RED})
    writer.close()
    with Image.open(tmp_path / "samples" / "samples-0000020.png") as saved:
        np.testing.assert_array_equal(saved, RED)


def test_a_mirror_copies_what_has_changed(tmp_path, caplog):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "metrics.jsonl").write_text("1\n")
    mirror = Mirror(str(tmp_path / "far"))
    mirror.fetch("metrics.jsonl")
    mirror.fetch("not there")
    with (mirror.local / "metrics.jsonl").open("a") as lines:
        lines.write("2\n")
    (mirror.local / "samples").mkdir()
    (mirror.local / "samples" / "a.png").write_bytes(b"a")
    mirror.push()
    assert (tmp_path / "far" / "metrics.jsonl").read_text() == "1\n2\n"
    (tmp_path / "far" / "samples" / "a.png").unlink()
    mirror.push()
    assert not (tmp_path / "far" / "samples" / "a.png").exists()  # nothing had changed here
    (mirror.local / "samples" / "b.png").write_bytes(b"b")
    (tmp_path / "far" / "samples").rmdir()
    (tmp_path / "far" / "samples").write_text("in the way")
    mirror.push()
    assert "samples/b.png was not written" in caplog.text
    (tmp_path / "far" / "samples").unlink()
    mirror.close()
    assert (tmp_path / "far" / "samples" / "b.png").read_bytes() == b"b" and not mirror.local.exists()


def _masked(data):
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _events(folder):
    """Every event of a TensorBoard folder, its records read and checked as TFRecord is specified."""
    events = []
    for path in sorted(folder.iterdir()):
        stream = io.BytesIO(path.read_bytes())
        while head := stream.read(8):
            assert struct.unpack("<I", stream.read(4))[0] == _masked(head)
            data = stream.read(struct.unpack("<Q", head)[0])
            assert struct.unpack("<I", stream.read(4))[0] == _masked(data)
            events.append(Event.FromString(data))
    return events


def test_tensorboard_holds_numbers_and_pictures(tmp_path):
    for start in (0, 2):
        writer = MetricWriter(str(tmp_path), start_step=start)
        writer.scalars(start + 1, {"loss": 0.25 + start, "validation/t050": 0.5})
        writer.pictures(start + 1, "samples", RED, {})
        writer.close()
    events = _events(tmp_path / "tensorboard")
    scalars = {(e.step, v.tag): v.simple_value for e in events for v in e.summary.value if not v.HasField("image")}
    assert scalars == {
        (1, "loss"): 0.25,
        (1, "validation/t050"): 0.5,
        (3, "loss"): 2.25,
        (3, "validation/t050"): 0.5,
    }
    pictures = [(e.step, v.tag, v.image) for e in events for v in e.summary.value if v.HasField("image")]
    assert [(step, tag) for step, tag, _ in pictures] == [(1, "samples"), (3, "samples")]
    with Image.open(io.BytesIO(pictures[0][2].encoded_image_string)) as shown:
        np.testing.assert_array_equal(shown.convert("RGB"), RED)
    restarts = [e.step for e in events if e.session_log.status == e.session_log.START]
    assert 3 in restarts  # what lies beyond the resumed step is hidden by TensorBoard


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    """Two sessions of a run: numbers, and tables that hold every prompt at every step, below the work folder."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", "")
    monkeypatch.delenv("WANDB_DATA_DIR")  # the writer sets it; this takes it back
    writer = MetricWriter(str(tmp_path), 0, "a-project", {"batch_size": 8})
    for step in (1, 2):
        writer.scalars(step, {"loss": 1 / step})
        writer.pictures(step, "samples", RED, {"a red cube": RED, "a blue cube": BLUE})
    writer.close()
    first = (tmp_path / "wandb_id").read_text()
    writer = MetricWriter(str(tmp_path), 2, "a-project", {"batch_size": 8})
    writer.scalars(3, {"loss": 0.25})
    writer.pictures(3, "samples", BLUE, {"a red cube": BLUE})
    writer.table(3, "evaluation_table", ("measure", "value"), [("kid", 0.5)])
    writer.close()
    assert (tmp_path / "wandb_id").read_text() == first
    runs = sorted(path for path in (tmp_path / "wandb").glob("offline-run-*") if path.is_dir())
    # Two sessions within a second are numbered apart by what follows the id.
    assert runs and all(f"-{first}" in path.name for path in runs)
    assert all(list(path.glob(f"run-{first}.wandb")) for path in runs)
    both, red = ("a red cube", "a blue cube"), ("a red cube",)
    shown = [[step, prompt] for step, prompts in ((1, both), (2, both), (3, red)) for prompt in prompts]
    tables = [json.loads(path.read_text()) for run in runs for path in run.glob("files/media/table/*.table.json")]
    assert [table["data"] for table in tables if table["columns"] == ["measure", "value"]] == [[["kid", 0.5]]]
    tables = [table for table in tables if table["columns"] != ["measure", "value"]]
    assert all(table["columns"] == ["step", "prompt", "picture"] for table in tables)
    assert sorted(row[:2] for table in tables for row in table["data"]) == sorted(shown)
    sheets = [path for run in runs for path in run.glob("files/media/images/*.png")]
    assert len(sheets) == 3
    # What a table shows waits beside the run, until `wandb sync`: its pictures, and the rows that name them.
    staged = [path.read_bytes() for path in (tmp_path / "wandb" / "artifacts").rglob("*") if path.is_file()]
    pictures = [Image.open(io.BytesIO(data)) for data in staged if data.startswith(b"\x89PNG")]
    assert {picture.convert("RGB").getpixel((0, 0)) for picture in pictures} == {(255, 0, 0), (0, 0, 255)}
    rows = [row for data in staged if data.startswith(b"{") for row in json.loads(data)["data"] if len(row) == 3]
    assert {(step, prompt, picture["_type"]) for step, prompt, picture in rows} == {
        (step, prompt, "image-file") for step, prompt in shown
    }


def test_missing_weights_and_biases_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ValueError, match=r"key wandb is 'a-project', but wandb is not installed: pip install"
    ) as caught:
        MetricWriter(str(tmp_path), 0, "a-project")
    assert "\n" not in str(caught.value)


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    writer = MetricWriter(str(tmp_path), 0, "a-project")
    writer.scalars(1, {"loss": 1.0})
    writer.pictures(1, "samples", RED, {})
    writer.close()
    assert list(tmp_path.iterdir()) == []
