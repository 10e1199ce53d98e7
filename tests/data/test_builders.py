"""Builders: what goes in comes out, what cannot is reported by reason, and nothing is left half-written."""

from __future__ import annotations

import errno
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from if_jax.data import builders, folder, grammar, pipeline, scenes


def _picture(path: Path, side: tuple[int, int] = (24, 16), colour: str = "red", **kwargs: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", side, colour).save(path, **kwargs)


def _captions(out: Path) -> dict[str, np.ndarray]:
    records = pipeline.open_records(out)
    return {
        records[i]["caption"].decode(): np.asarray(Image.open(io.BytesIO(records[i]["image"])))
        for i in range(len(records))
    }


def test_scenes_make_the_round_trip_without_tensorflow(tmp_path: Path) -> None:
    out = tmp_path / "scenes"
    report = builders.build("scenes", out, count=8, size=16, seed=3)
    assert (report.count, report.size, report.skipped) == (8, 16, {})
    expected = np.asarray(scenes.draw(np.arange(8), 3, 16))
    described = scenes.as_numpy(scenes.sample_scenes(np.arange(8), 3))
    stored = _captions(out)
    for i, scene in enumerate(described):
        caption = grammar.caption(scene, np.random.default_rng((3, i)))
        np.testing.assert_array_equal(stored[caption], expected[i])
    builder = tfds.builder_from_directory(str(out))
    assert builder.info.splits["train"].num_examples == 8
    labels = [json.loads(record["labels"]) for record in builder.as_data_source(split="train")]
    assert sorted(map(str, labels)) == sorted(str(grammar.labels(scene)) for scene in described)
    assert "tensorflow" not in sys.modules
    assert not list(tmp_path.glob(".*"))


def test_inspect_tells_what_there_is(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    _picture(source / "a.png")
    (source / "a.txt").write_text("x" * 100)
    (source / "b.png").touch()
    builders.build("folder", out, source=source, size=16)
    told = builders.inspect(out)
    assert "1 pictures of 16 px (folder)" in told
    assert "1 of 1 longer than the 76" in told
    assert "skipped 1: empty file (b.png)" in told


def test_a_folder_with_text_files(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    _picture(source / "deep" / "er" / "wide.jpg", (48, 20), "blue")
    (source / "deep" / "er" / "wide.txt").write_text("  a blue field\n")
    _picture(source / "tall.PNG", (20, 48), "lime")
    (source / "tall.txt").write_text("ein grünes Feld", encoding="utf-8")
    builders.build("folder", out, source=source, size=16)
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
    report = builders.build("folder", out, source=source, size=16)
    assert set(_captions(out)) == {"first caption", "second caption"}
    assert report.skipped == {
        "outside the folder": ["../secret.png"],
        "missing file": ["gone.png"],
        "no caption": ["one.png"],
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
    report = builders.build("folder", out, source=source, size=16)
    assert report.count == 1 and set(_captions(out)) == {"a good picture"}
    assert report.skipped == {
        "unreadable image": ["cut.png", "letter.png"],
        "empty file": ["empty.png"],
        "no caption": ["mute.png"],
        "smaller than 16 px": ["tiny.png"],
        "unreadable caption": ["garbled.png"],
    }
    assert "skipped 2: unreadable image (cut.png, letter.png)" in str(report)


def test_pictures_are_turned_upright_and_flattened(tmp_path: Path) -> None:
    def read(path: Path, size: int = 8) -> np.ndarray:
        picture, problem = folder.read_picture(folder.Entry(path.name, path, "caption"), size)
        assert picture is not None, problem
        return np.asarray(picture)

    halves = np.zeros((16, 16, 3), np.uint8)
    halves[:8] = 255  # white above black as stored; orientation 3 says: turn it half around
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(halves).save(tmp_path / "turned.png", exif=exif)
    turned = read(tmp_path / "turned.png")
    assert turned[0].max() < 40 and turned[-1].min() > 215

    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read(tmp_path / "clear.png") == 255).all()
    Image.new("P", (8, 8), 0).save(tmp_path / "palette.gif")
    assert read(tmp_path / "palette.gif").shape == (8, 8, 3)
    Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(tmp_path / "deep.png")
    assert (read(tmp_path / "deep.png") == 128).all()


def test_a_bomb_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _picture(tmp_path / "big.png", (40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    entry = folder.Entry("big.png", tmp_path / "big.png", "a big picture")
    assert folder.read_picture(entry, 16) == (None, "too many pixels")


def test_a_full_disk_leaves_nothing_and_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    _picture(source / "a.png")
    (source / "a.txt").write_text("kept")
    builders.build("folder", out, source=source, size=16)

    def full(picture: Image.Image) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(builders, "_png", full)
    for place in (out, tmp_path / "new"):
        with pytest.raises(OSError, match="No space left"):
            builders.build("folder", place, source=source, size=16, overwrite=True)
    assert set(_captions(out)) == {"kept"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_what_exists_is_replaced_only_when_asked_and_ours(tmp_path: Path) -> None:
    source, out, mine = tmp_path / "source", tmp_path / "out", tmp_path / "mine"
    _picture(source / "a.png")
    for text, overwrite in (("first", False), ("second", True)):
        (source / "a.txt").write_text(text)
        builders.build("folder", out, source=source, size=16, overwrite=overwrite)
    assert set(_captions(out)) == {"second"}
    with pytest.raises(FileExistsError, match=r"exists: choose another --out, or replace it with --overwrite"):
        builders.build("folder", out, source=source, size=16)
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="not a data set written here and is kept"):
        builders.build("folder", mine, source=source, size=16, overwrite=True)
    assert (mine / "thesis.txt").read_text() == "precious"


def test_mistakes_get_one_line(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    _picture(tmp_path / "dumb" / "a.png")
    cases = (
        (ValueError, "'scene' is unknown: choose scenes or folder", "scene", {}),
        (ValueError, "needs --source", "folder", {}),
        (FileNotFoundError, "does not exist: give --source", "folder", {"source": tmp_path / "nowhere"}),
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
