"""Arrays to pictures and files: the rounding of diffusers, the order of prompts, nothing overwritten unasked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from if_jax.inference.pictures import Drawn, grid, own_mark, read_notes, save_pictures, to_pil, with_watermark


def pictures(count: int, shade: int = 0) -> list[Image.Image]:
    return [Image.new("RGB", (4, 3), (shade + i, 0, 0)) for i in range(count)]


def test_to_pil_rounds_and_clamps():
    image = np.array([-3, -1, -0.998, 0, 0.998, 1, 7], np.float32)[:, None, None].repeat(3, axis=2)
    assert np.asarray(to_pil(image))[:, 0, 0].tolist() == [0, 0, 0, 128, 255, 255, 255]


def test_grid_is_row_by_row():
    sheet = np.asarray(grid(pictures(5, 10), columns=3, gap=2))
    assert sheet.shape == (8, 16, 3)
    assert [int(sheet[5 * (i // 3), 6 * (i % 3), 0]) for i in range(6)] == [10, 11, 12, 13, 14, 255]
    assert (sheet[3] == 255).all() and grid(pictures(9), gap=0).size == (12, 9)
    with pytest.raises(ValueError, match="no pictures"):
        grid([])


def test_files_are_numbered_in_prompt_order_and_kept(tmp_path):
    out = tmp_path / "a/b"
    written, kept = save_pictures({"I": pictures(2), "II": pictures(2, 100)}, out)
    names = ["0000-I.png", "0001-I.png", "0000-II.png", "0001-II.png", "grid-I.png", "grid-II.png"]
    assert [path.name for path in written] == names and not kept
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    assert np.asarray(Image.open(out / "0001-II.png"))[0, 0, 0] == 101

    written, kept = save_pictures({"I": pictures(3, 50)}, out)
    assert [path.name for path in written] == ["0002-I.png"] and len(kept) == 3
    assert np.asarray(Image.open(out / "0000-I.png"))[0, 0, 0] == 0
    written, kept = save_pictures({"I": pictures(3, 50)}, out, overwrite=True)
    assert len(written) == 4 and not kept
    assert np.asarray(Image.open(out / "0000-I.png"))[0, 0, 0] == 50


def test_a_picture_that_fails_leaves_no_half_file(tmp_path, monkeypatch):
    write = Path.write_bytes

    def cut_off(self, content):
        write(self, content[:20])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", cut_off)
    with pytest.raises(OSError):
        save_pictures({"I": pictures(1)}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_watermark_is_a_picture_that_starts_no_program(tmp_path):
    Image.new("RGBA", (40, 4), (0, 0, 255, 255)).save(tmp_path / "wide.png")
    save_pictures({"I": [Image.new("RGB", (64, 64))]}, tmp_path / "out", watermark=tmp_path / "wide.png")
    assert np.asarray(Image.open(tmp_path / "out/0000-I.png"))[..., 2].any()
    Image.new("RGB", (8, 8)).save(tmp_path / "mark.png", "EPS")  # Pillow would start Ghostscript on it
    with pytest.raises(ValueError, match=r"mark\.png: no picture that Pillow can read by itself"):
        save_pictures({"I": pictures(1)}, tmp_path / "none", watermark=tmp_path / "mark.png")


def test_captions_stand_below_their_pictures():
    rows = [Image.new("RGB", (64, 40), "white") for _ in range(3)]
    sheet = np.asarray(grid(rows, columns=3, captions=["two red spheres and a blue cube", "", "a"]))
    below = sheet[40:] < 128
    assert sheet.shape[0] > 60 and not (sheet[:40] < 128).any()
    ink = [below[:, 66 * k : 66 * k + 66].sum() for k in range(3)]
    assert ink[0] > 5 * ink[2] > 0 and ink[1] == 0


def test_a_png_says_how_it_was_drawn(tmp_path):
    def notes(stage, row):
        return {"stage": stage, "prompt": f"Würfel {row}"}

    save_pictures({"II": pictures(2)}, tmp_path, first=7, notes=notes)
    assert read_notes(tmp_path / "0008-II.png") == {"stage": "II", "prompt": "Würfel 1"}
    pictures(1)[0].save(tmp_path / "plain.png")
    for name, message in (("plain.png", "holds no settings"), ("none.png", "no such file"), ("grid-II.png", "no sett")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            read_notes(tmp_path / name)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (256, 256), (1024, 768)])
def test_the_watermark_has_the_place_and_size_of_ifs(width, height):
    watermark = pytest.importorskip("diffusers.pipelines.deepfloyd_if.watermark")
    mark = own_mark()
    theirs = watermark.IFWatermarker()
    theirs.watermark_image_as_pil = mark
    blank = Image.new("RGB", (width, height), "grey")
    (expected,) = theirs.apply_watermark([blank.copy()])
    ours = np.asarray(with_watermark(blank, mark))
    assert (ours != np.asarray(blank)).any()
    np.testing.assert_array_equal(ours, np.asarray(expected))


def test_a_notebook_shows_the_last_stage():
    assert Drawn(I=pictures(1), II=pictures(2, 100))._repr_png_()[:4] == b"\x89PNG"
    assert Drawn()._repr_png_() is None and Drawn(I=[np.zeros((2, 2, 3))])._repr_png_() is None
