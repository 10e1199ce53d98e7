"""Pictures and masks of users: every form gives the same picture, and what cannot be one is refused in a line."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from if_jax.data import preprocessing
from if_jax.inference import inputs

RED = np.zeros((6, 10, 3), np.uint8)
RED[..., 0] = 200


def test_every_mode_becomes_upright_rgb(tmp_path):
    plain = Image.fromarray(RED)
    clear = plain.convert("RGBA")
    clear.putalpha(Image.new("L", (10, 6), 0))
    turned = plain.copy()
    turned.paste((0, 0, 250), (0, 0, 5, 6))
    exif = Image.Exif()
    exif[274] = 6  # to be shown turned by 90 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    deep = Image.fromarray(np.full((6, 10), 51400, np.uint16))
    deep.save(tmp_path / "deep.png")
    palette = plain.convert("P", palette=Image.Palette.ADAPTIVE)

    assert np.asarray(inputs.read_picture(clear)).min() == 255  # laid over white
    assert np.asarray(inputs.read_picture(palette))[0, 0].tolist() == [200, 0, 0]
    assert np.asarray(inputs.read_picture(plain.convert("CMYK"))).shape == (6, 10, 3)
    assert np.unique(np.asarray(inputs.read_picture(tmp_path / "deep.png"))).tolist() == [200]
    assert np.unique(np.asarray(inputs.read_picture(Image.new("1", (9, 9), 1)))).tolist() == [255]
    upright = np.asarray(inputs.read_picture(str(tmp_path / "turned.png")))
    assert upright.shape == (10, 6, 3) and upright[0, 3, 2] > upright[9, 3, 2]
    floats = RED.astype(np.float32) / 127.5 - 1
    np.testing.assert_array_equal(inputs.read_picture(floats), floats)


def _in_mode(mode: str) -> tuple[Image.Image, list[int], dict]:
    """A picture 10×6 in a mode, the RGB value it has to become, and how its file is saved."""
    plain, clear = Image.fromarray(RED), Image.new("L", (10, 6), 0)
    if mode == "P with transparency":
        palette = plain.convert("P", palette=Image.Palette.ADAPTIVE)
        return palette, [255] * 3, {"format": "PNG", "transparency": palette.getpixel((0, 0))}
    if mode in ("LA", "RGBA"):
        picture = plain.convert(mode)
        picture.putalpha(clear)
        return picture, [255] * 3, {"format": "PNG"}
    if mode == "CMYK turned":
        exif = Image.Exif()
        exif[274] = 6  # to be shown turned by 90 degrees
        return Image.new("CMYK", (10, 6), (0, 0, 0, 55)), [200] * 3, {"format": "TIFF", "exif": exif}
    values = {"1": True, "L": 200, "I;16": 200 * 257, "I;16 dark": 200, "I": 200, "I deep": 200 * 257, "F": 200.0}
    dtype = {"1": bool, "L": np.uint8, "I": np.int32, "F": np.float32}.get(mode.split()[0], np.uint16)
    dtype = np.int32 if mode == "I deep" else dtype
    target = {"1": 255, "I;16 dark": 1}.get(mode, 200)
    return Image.fromarray(np.full((6, 10), values[mode], dtype)), [target] * 3, {"format": "TIFF"}


@pytest.mark.parametrize(
    "mode",
    ["1", "L", "LA", "P with transparency", "RGBA", "I;16", "I;16 dark", "I", "I deep", "F", "CMYK turned"],
)
def test_every_mode_trains_as_it_is_drawn_over(mode, tmp_path):
    """One conversion for both: a file of pictures to train on, and the same as a picture to draw over."""
    picture, expected, save = _in_mode(mode)
    assert picture.mode == mode.split()[0]
    picture.save(tmp_path / "picture", **save)
    trained = preprocessing.read_picture((tmp_path / "picture").read_bytes())
    drawn_over = inputs.read_picture(tmp_path / "picture")
    assert trained.mode == drawn_over.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(trained), np.asarray(drawn_over))
    assert np.unique(np.asarray(trained).reshape(-1, 3), axis=0).tolist() == [expected]
    assert trained.size == ((6, 10) if mode == "CMYK turned" else (10, 6))


def test_fitting_agrees_between_pictures_and_arrays():
    noise = np.random.default_rng(0).integers(60, 190, (24, 36, 3), dtype=np.uint8)  # no overshoot to be clipped
    by_pillow = inputs.fit_picture(Image.fromarray(noise), (8, 12))
    by_us = inputs.fit_picture(noise.astype(np.float32) / 127.5 - 1, (8, 12))
    assert by_pillow.shape == by_us.shape == (8, 12, 3)
    np.testing.assert_allclose(by_us, by_pillow, atol=1.1 / 127.5)  # Pillow rounds to 8 bits after each axis


def test_masks_are_white_where_to_draw():
    grey = np.zeros((6, 10))
    grey[:, :5] = 1
    for picture in (grey, grey.astype(bool), grey[..., None], Image.fromarray((grey * 255).astype(np.uint8))):
        mask = inputs.fit_mask(inputs.read_mask(picture, (10, 6)), (6, 10))
        assert mask.shape == (6, 10, 1) and mask.dtype == np.float32
        np.testing.assert_array_equal(mask[..., 0], grey)
    clear = Image.new("RGBA", (10, 6), (255, 255, 255, 0))
    assert np.asarray(inputs.read_mask(clear, (10, 6))).max() == 0  # what is not there is not drawn


@pytest.mark.parametrize(
    ("ratio", "short", "multiple", "size"),
    [
        (1, 64, 8, (64, 64)),
        (1.5, 64, 8, (64, 96)),
        (0.5, 64, 8, (128, 64)),
        (1.02, 64, 8, (64, 64)),
        (2, 48, 16, (48, 96)),
    ],
)
def test_sizes_have_the_short_side_of_the_stage(ratio, short, multiple, size):
    assert inputs.size_of(ratio, short, multiple) == size


@pytest.mark.parametrize("text", ["0:3", "3:0", "9:1", "1:9", "3", "a:b", "-1:2", "nan:1", "1:2:3", ""])
def test_no_aspect_ratio(text):
    with pytest.raises(ValueError, match="give width:height"):
        inputs.parse_aspect_ratio(text)
    assert inputs.parse_aspect_ratio("3:2") == 1.5


def test_what_is_no_picture_is_one_line(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    Image.effect_noise((40, 40), 90).save(tmp_path / "whole.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.jpg", "EPS")  # Pillow would start Ghostscript on it
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:600])
    cases = [
        (tmp_path / "none.png", "no such file"),
        (tmp_path, "no picture that Pillow can read"),
        (tmp_path / "text.png", "no picture that Pillow can read"),
        (tmp_path / "photo.jpg", "no picture that Pillow can read"),
        (tmp_path / "cut.png", "cut.png"),
        (np.zeros((0, 4, 3), np.float32), "it has no pixels"),
        (Image.new("RGB", (0, 3)), "it has no pixels"),
        (np.full((4, 4, 3), np.nan, np.float32), "not finite"),
        (RED.astype(np.float32), r"from 0 to 200: give floats in \[-1, 1\] \(divide by 127.5 and subtract 1"),
        (np.linspace(-3, 1, 48, dtype=np.float32).reshape(4, 4, 3), r"from -3 to 1: give floats in \[-1, 1\] \(clip"),
        (RED, "array of uint8"),
        (np.zeros((4, 4), np.float32), "array of float32"),
        (Image.new("1", (20_000, 20_000)), "make it smaller than 100,000,000 pixels"),
        (Image.new("L", (90, 10)), "crop it to an aspect ratio"),
    ]
    for picture, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            inputs.read_picture(picture)
            pytest.fail(f"taken for a picture: {picture}")
        assert "\n" not in str(error.value)
    for mask, message in [(np.full((6, 10), 2.0), "outside"), (np.zeros((3, 6, 10)), "give"), (MASK, "same size")]:
        with pytest.raises(ValueError, match=message):
            inputs.read_mask(mask, (10, 6))


MASK = Image.new("L", (6, 10))
