"""Preparation: what any file becomes, and a folder of hostile files, each of which is used or named."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import record_stores
from PIL import Image

from if_jax.data import sources
from if_jax.data.preprocessing import UnusableRecord, fit, read_caption, read_picture

ENDS = (0, 1, 5, 10, 40, 60)  # bytes of a file that is cut there
SAVED = {
    "png": {},
    "jpg": {"quality": 90},
    "webp": {"lossless": True},
    "gif": {},
    "bmp": {},
    "tiff": {},
}


def _noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8))


def _bytes(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, {"jpg": "JPEG"}.get(kind, kind), **options)
    return buffer.getvalue()


def _usable() -> dict[str, bytes]:
    """Pictures of every kind that must be used, by file name."""
    red, grey = Image.new("RGB", (32, 32), "red"), Image.new("L", (32, 32), 128)
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "lime", "blue")]
    upside = Image.Exif()
    upside[0x0112] = 3
    deep = Image.fromarray(np.full((32, 32), 32768, np.uint16))
    return {
        "plain.png": _bytes(red, "png"),
        "plain.jpg": _bytes(red, "jpg"),
        "progressive.jpeg": _bytes(red, "jpg", progressive=True),
        "turned.jpg": _bytes(red, "jpg", exif=upside),
        "plain.webp": _bytes(red, "webp"),
        "plain.bmp": _bytes(red, "bmp"),
        "plain.tif": _bytes(red, "tiff"),
        "grey.png": _bytes(grey, "png"),
        "grey.jpg": _bytes(grey, "jpg"),
        "one-bit.png": _bytes(grey.convert("1"), "png"),
        "palette.png": _bytes(red.convert("P"), "png"),
        "palette-clear.png": _bytes(clear.convert("P"), "png", transparency=0),
        "alpha.png": _bytes(clear, "png"),
        "alpha.webp": _bytes(clear, "webp", lossless=True),
        "grey-alpha.png": _bytes(clear.convert("LA"), "png"),
        "cmyk.jpg": _bytes(red.convert("CMYK"), "jpg"),
        "cmyk.tif": _bytes(red.convert("CMYK"), "tiff"),
        "sixteen.png": _bytes(deep, "png"),
        "sixteen.tiff": _bytes(deep, "tiff"),
        "animated.gif": _bytes(frames[0], "gif", save_all=True, append_images=frames[1:]),
        "animated.webp": _bytes(frames[0], "webp", save_all=True, append_images=frames[1:], lossless=True),
        "animated.png": _bytes(frames[0], "png", save_all=True, append_images=frames[1:]),
        "wrong-name.png": _bytes(red, "jpg"),
        "SHOUTED.PNG": _bytes(red, "png"),
        "strip.png": _bytes(Image.new("RGB", (2000, 20), "red"), "png"),
    }


def _bomb() -> bytes:
    """A PNG that claims 30,000 x 30,000 pixels."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def _hostile(folder: Path) -> dict[str, list[str]]:
    """Write files that cannot be used, with captions; returns their names by the reason expected."""
    expected: dict[str, list[str]] = {"unreadable image": [], "empty file": []}
    for kind, options in SAVED.items():
        whole = _bytes(_noise(), kind, **options)
        for cut in (*ENDS, len(whole) // 2):
            (folder / f"cut-{cut}.{kind}").write_bytes(whole[:cut])
            expected["unreadable image" if cut else "empty file"].append(f"cut-{cut}.{kind}")
    flipped = bytearray(_bytes(_noise(), "png"))
    flipped[200:220] = bytes(20)
    files = {"text.png": b"Dear Sir", "html.jpg": b"<html>404</html>", "zeros.webp": bytes(999), "flipped.png": flipped}
    files |= {"postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n", "vector.png": b"<svg/>"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
        expected["unreadable image"].append(name)
    (folder / "bomb.png").write_bytes(_bomb())
    expected["too many pixels"] = ["bomb.png"]
    for path in folder.iterdir():
        path.with_name(f"{path.stem}.txt").write_text("a caption")
    good = _bytes(_noise(), "png")
    captions = {"latin.png": b"caf\xe9", "utf16.png": "a cat".encode("utf-16"), "blank.png": b" \n\t", "void.png": b""}
    for name, text in {**captions, "long.png": b"x" * (2**20 + 1), "mute.png": None}.items():
        (folder / name).write_bytes(good)
        if text is not None:
            (folder / name).with_suffix(".txt").write_bytes(text)
    expected |= {
        "caption is not UTF-8": ["latin.png", "utf16.png"],
        "no caption": ["blank.png", "mute.png", "void.png"],
    }
    expected["caption of more than a megabyte"] = ["long.png"]
    for name in ("pipe.png", "folder.png", "dangling.png", "circle.png", "lonely.txt", "drawing.svg", "notes.doc"):
        path = folder / name
        if name == "pipe.png":
            os.mkfifo(path)  # opening it would wait for ever
        elif name == "folder.png":
            path.mkdir()
        elif name.endswith("ing.png"):
            path.symlink_to("nowhere")
        elif name == "circle.png":
            path.symlink_to(name)
        else:
            path.write_text("x")
    expected |= {"not a file": ["folder.png", "pipe.png"], "missing file": ["dangling.png"]}
    expected |= {"file cannot be opened": ["circle.png"], "no picture beside this caption": ["lonely.txt"]}
    expected["not a kind of picture read here"] = ["drawing.svg", "notes.doc"]
    return expected


def test_a_folder_of_hostile_files_is_used_or_named_to_the_last(tmp_path: Path) -> None:
    expected = _hostile(tmp_path)
    assert sum(map(len, expected.values())) >= 60
    usable = _usable()
    for name, content in usable.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).with_suffix(".txt").write_text("\ufeffa caption", encoding="utf-8")
    os.rename(tmp_path / "plain.bmp", os.fsencode(tmp_path) + b"/\xff.bmp")  # a name that is no UTF-8
    (tmp_path / "plain.txt").write_text("a caption")
    os.link(tmp_path / "plain.txt", os.fsencode(tmp_path) + b"/\xff.txt")
    opened = sources.open_stored(str(tmp_path))
    assert {reason: sorted(names) for reason, names in opened.left_out.items()} == {
        reason: sorted(names) for reason, names in expected.items()
    }
    assert len(opened) == len(usable)
    for number in range(len(opened)):
        assert opened[number].captions == ("a caption",)
        assert fit(read_picture(opened[number].picture), 16).size == (16, 16)


def test_what_every_kind_of_picture_becomes() -> None:
    usable = _usable()
    white = {"palette-clear.png", "alpha.png", "alpha.webp", "grey-alpha.png"}
    grey = {"grey.png", "grey.jpg", "sixteen.png", "sixteen.tiff"}
    for name, content in usable.items():
        picture = read_picture(content)
        assert picture.mode == "RGB"
        middle = np.asarray(picture, int)[10, 10]
        if name != "one-bit.png":
            target = (255, 255, 255) if name in white else (128,) * 3 if name in grey else (255, 0, 0)
            assert np.abs(middle - target).max() <= 2, name


def test_the_square_is_cut_about_a_shifted_middle_by_bicubic() -> None:
    wide = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (100, 1, 3)))
    for shift, left in ((0.0, 50), (0.1, 60), (-0.1, 40), (0.9, 100)):  # the last ends at the edge
        np.testing.assert_array_equal(np.asarray(fit(wide, 100, shift))[0, :, 0], np.arange(left, left + 100))
    expected = wide.crop((50, 0, 150, 100)).resize((25, 25), Image.Resampling.BICUBIC, reducing_gap=None)
    np.testing.assert_array_equal(np.asarray(fit(wide, 25)), np.asarray(expected))
    tall = wide.transpose(Image.Transpose.TRANSPOSE)
    np.testing.assert_array_equal(np.asarray(fit(tall, 100, 0.1))[:, 0, 0], np.arange(60, 160))


def test_captions_are_read_or_refused_by_reason() -> None:
    assert read_caption("\ufeff ein grünes Feld\n".encode()) == "ein grünes Feld"
    for wrong, reason in ((b"\xff\xfe", "not UTF-8"), (b"  ", "no caption")):
        with pytest.raises(UnusableRecord, match=reason):
            read_caption(wrong)


def test_a_folder_of_nothing_usable_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(record_stores.encoded(record_stores.picture(0)))
    with pytest.raises(ValueError, match=r"no usable picture in .*: skipped 1: no caption \(a.png\)") as caught:
        sources.open_stored(str(tmp_path))
    assert "\n" not in str(caught.value)
