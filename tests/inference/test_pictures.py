"""Arrays to pictures and files: the rounding of diffusers, the order of prompts, nothing overwritten unasked."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from if_jax.inference.pictures import grid, save_pictures, to_pil


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
    def cut_off(self, path, format):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", cut_off)
    with pytest.raises(OSError):
        save_pictures({"I": pictures(1)}, tmp_path)
    assert not list(tmp_path.iterdir())
