"""Builders: what goes in comes out, what cannot is reported by reason, and nothing is left half-written."""

from __future__ import annotations

import errno
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import record_stores
import tensorflow_datasets as tfds
from drawn_scenes import draw_scenes
from PIL import Image

from if_jax.data import builders, sources
from if_jax.data.index import Filter
from if_jax.data.inspect import inspect
from if_jax.data.preprocessing import read_picture
from if_jax.scenes import grammar, sampling
from if_jax.scenes.scene import as_numpy


def _picture(path: Path, side: tuple[int, int] = (24, 16), colour: str = "red", **kwargs: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", side, colour).save(path, **kwargs)


def _captions(out: Path) -> dict[str, np.ndarray]:
    records = sources.open_stored(str(out))
    assert not records.left_out
    return {text: np.asarray(read_picture(record.picture)) for record in records for text in record.captions}


def _hashes(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("*array_record*")}


def test_scenes_make_the_round_trip_without_tensorflow(tmp_path: Path) -> None:
    out = tmp_path / "scenes"
    report = builders.build("scenes", out, count=8, size=16, seed=3)
    assert (report.count, report.size, report.skipped) == (8, 16, {})
    expected = np.asarray(draw_scenes(np.arange(8), 3, 16))
    described = as_numpy(sampling.sample_scenes(np.arange(8), 3))
    stored = _captions(out)
    for i, scene in enumerate(described):
        caption = grammar.caption(scene, np.random.default_rng((3, i)))
        np.testing.assert_array_equal(stored[caption], expected[i])
    builder = tfds.builder_from_directory(str(out))
    assert builder.info.splits["train"].num_examples == 8
    labels = [json.loads(record["labels"]) for record in builder.as_data_source(split="train")]
    assert labels == [grammar.labels(scene) for scene in described]
    assert "tensorflow" not in sys.modules
    assert not list(tmp_path.glob(".*")) and not [path for path in out.glob(".*") if path.suffix != ".index"]


def test_an_interrupted_build_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = record_stores.write_folder(tmp_path / "source", 10)
    monkeypatch.setattr(builders, "PER_SHARD", 3)
    builders.build("folder", tmp_path / "whole", source=source, size=8, workers=1)
    write, written = builders._write_shard, []

    def killed(shard: builders._Shard) -> dict:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard.number)
        return write(shard)

    monkeypatch.setattr(builders, "_write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        builders.build("folder", tmp_path / "out", source=source, size=8, workers=1)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(builders, "_write_shard", write)
    encode, encoded = builders.png, []
    monkeypatch.setattr(builders, "png", lambda picture: encoded.append(0) or encode(picture))
    builders.build("folder", tmp_path / "out", source=source, size=8, workers=1)
    assert len(encoded) == 4  # of ten: six were kept
    assert _hashes(tmp_path / "out") == _hashes(tmp_path / "whole") and len(_hashes(tmp_path / "out")) == 4
    assert [record.captions for record in sources.open_stored(str(tmp_path / "out"))] == [
        (f"Picture number {i}",) for i in range(10)
    ]


def test_processes_write_the_same_bytes_from_tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builders, "PER_SHARD", 5)
    tars = record_stores.write_tars(tmp_path / "tars", 9, 5)
    for workers in (1, 2):
        builders.build("folder", tmp_path / str(workers), source=tars, size=8, workers=workers)
    assert _hashes(tmp_path / "1") == _hashes(tmp_path / "2") and len(_hashes(tmp_path / "1")) == 2
    built = sources.open_stored(str(tmp_path / "1"), Filter(min_clip=0.2))  # the scores travel with the pictures
    assert len(built) == 9 and built[3].metadata["similarity"] == pytest.approx(0.203)


def test_inspect_tells_what_there_is(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    _picture(source / "a.png")
    (source / "a.txt").write_text("x" * 100)
    (source / "b.png").touch()
    (source / "b.txt").write_text("nothing")
    lines = str(inspect(str(source))).splitlines()
    assert lines[0].startswith("usable 1 of 2 records in ") and "skipped 1: empty file (b.png)" in lines
    assert any("100 to 100 characters" in line for line in lines)
    builders.build("folder", out, source=source, size=16, workers=1)
    inspected = inspect(str(out))
    assert str(inspected).startswith(f"usable 1 of 1 records in {out} (folder, 16 px; 1 left out when built)")
    sheet = np.asarray(inspected.sheet)
    assert (sheet == (255, 0, 0)).all(-1).sum() == 160 * 160 and (sheet < 100).all(-1).any()  # picture and words


def test_a_folder_with_text_files(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    _picture(source / "deep" / "er" / "wide.jpg", (48, 20), "blue")
    (source / "deep" / "er" / "wide.txt").write_text("  a blue field\n")
    _picture(source / "tall.PNG", (20, 48), "lime")
    (source / "tall.txt").write_text("ein grünes Feld", encoding="utf-8")
    builders.build("folder", out, source=source, size=16, workers=1)
    stored = _captions(out)
    assert set(stored) == {"a blue field", "ein grünes Feld"}
    assert all(picture.shape == (16, 16, 3) for picture in stored.values())
    assert (stored["ein grünes Feld"] == (0, 255, 0)).all()


def test_a_folder_with_metadata(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    _picture(source / "one.png")
    _picture(source / "unlisted.png")
    _picture(tmp_path / "secret.png")
    lines = [
        '{"file_name": "one.png", "text": "first caption", "width": 24}',
        "",
        '{"file_name": "one.png", "text": "second caption"}',
        '{"file_name": "../secret.png", "text": "not yours"}',
        '{"file_name": "gone.png", "text": "gone"}',
        '{"file_name": "one.png"}',
        '{"text": "no name"}',
        "not json",
    ]
    (source / "metadata.jsonl").write_text("\n".join(lines))
    report = builders.build("folder", out, source=source, size=16, workers=1)
    assert set(_captions(out)) == {"first caption", "second caption"}
    assert report.skipped == {
        "outside the folder": ["../secret.png"],
        "missing file": ["gone.png"],
        "no caption": ["one.png (3)"],
        "not listed in metadata.jsonl": ["unlisted.png"],
        "line is not {file_name, text}": ["metadata.jsonl line 7", "metadata.jsonl line 8"],
    }


def test_bad_images_are_skipped_counted_and_reported_by_reason(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    names = ("good", "cut", "empty", "letter", "mute", "tiny", "garbled")
    for name in names:
        _picture(source / f"{name}.png")
        (source / f"{name}.txt").write_text(f"a {name} picture")
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(source / "cut.png")
    (source / "cut.png").write_bytes((source / "cut.png").read_bytes()[:600])
    (source / "empty.png").write_bytes(b"")
    (source / "letter.png").write_text("Dear Sir or Madam")
    (source / "mute.txt").unlink()
    _picture(source / "tiny.png", (15, 40))
    (source / "garbled.txt").write_bytes(b"\xff\xfe\xfa")
    report = builders.build("folder", out, source=source, size=16, workers=1)
    assert report.count == 1 and set(_captions(out)) == {"a good picture"}
    assert report.skipped == {
        "unreadable image": ["cut.png", "letter.png"],
        "empty file": ["empty.png"],
        "no caption": ["mute.png"],
        "smaller than 16 px": ["tiny.png"],
        "caption is not UTF-8": ["garbled.png"],
    }
    assert "skipped 2: unreadable image (cut.png, letter.png)" in str(report)


def test_a_full_disk_keeps_what_was_there_and_lets_the_build_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    _picture(source / "a.png")
    (source / "a.txt").write_text("kept")
    builders.build("folder", out, source=source, size=16, workers=1)

    def full(picture: Image.Image) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")

    encode = builders.png
    monkeypatch.setattr(builders, "png", full)
    for place in (out, tmp_path / "new"):
        with pytest.raises(OSError, match="No space left"):
            builders.build("folder", place, source=source, size=16, overwrite=True, workers=1)
    assert set(_captions(out)) == {"kept"}
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(builders, "png", encode)
    for place in (out, tmp_path / "new"):
        builders.build("folder", place, source=source, size=16, overwrite=True, workers=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "out", "source"]


def test_what_exists_is_replaced_only_when_asked_and_ours(tmp_path: Path) -> None:
    source, out, mine = tmp_path / "source", tmp_path / "out", tmp_path / "mine"
    _picture(source / "a.png")
    for text, overwrite in (("first", False), ("second", True)):
        (source / "a.txt").write_text(text)
        builders.build("folder", out, source=source, size=16, overwrite=overwrite, workers=1)
    assert set(_captions(out)) == {"second"}
    with pytest.raises(FileExistsError, match=r"exists: choose another --out, or replace it with --overwrite"):
        builders.build("folder", out, source=source, size=16, workers=1)
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="not a data set written here and is kept"):
        builders.build("folder", mine, source=source, size=16, overwrite=True)
    assert (mine / "thesis.txt").read_text() == "precious"


def test_mistakes_get_one_line(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    _picture(tmp_path / "dumb" / "a.png")
    cases = (
        (ValueError, "'scene' is unknown: choose scenes, tasks, emoji or folder", "scene", {}),
        (ValueError, "needs --source", "folder", {}),
        (FileNotFoundError, "does not exist: give a folder", "folder", {"source": tmp_path / "nowhere"}),
        (ValueError, "lists no image", "folder", {"source": tmp_path / "bare"}),
        (
            ValueError,
            r"no usable picture in .*: skipped 1: no caption \(a.png\)",
            "folder",
            {"source": tmp_path / "dumb", "size": 16},
        ),
        (ValueError, "count 0", "scenes", {"count": 0}),
    )
    for kind, words, name, options in cases:
        with pytest.raises(kind, match=words) as caught:
            builders.build(name, tmp_path / "out", **options)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
