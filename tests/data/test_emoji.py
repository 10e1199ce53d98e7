"""Emoji: pictures and names of two packages put together, called what they show, held out by it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from if_jax.data import builders, emoji, sources

TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}


def _packages(folder: Path) -> tuple[Path, Path]:
    """Where npm puts pictures and names."""
    places = folder / "@lobehub/fluent-emoji-3d/assets", folder / "emojibase-data/en"
    for place in places:
        place.mkdir(parents=True)
    return places


def test_emoji_are_paired_with_their_names_and_held_out_by_what_they_show(tmp_path: Path) -> None:
    pictures, names = _packages(tmp_path)
    tones = {"1F3FB": "light skin tone", "1F3FF": "dark skin tone"}
    entries = []
    for i in range(60):
        code = f"{0x1F400 + i:X}"
        skins = [{"label": f"thing {i}: {name}", "hexcode": f"{code}-{tone}"} for tone, name in tones.items()]
        entries.append({"label": f"thing {i}", "hexcode": code, "skins": skins})
        for each in (code, *(skin["hexcode"] for skin in skins)):
            Image.new("RGBA", (32, 32), (i, 200, 0, 255)).save(pictures / f"{each.lower()}-fe0f.webp", lossless=True)
    Image.new("RGBA", (32, 32)).save(pictures / "ffff.webp")
    (names / "data.json").write_text(json.dumps(entries))
    report = builders.build("emoji", tmp_path / "out", source=tmp_path, size=16, workers=1)
    assert report.count == 180 and report.skipped == {"no name": ["ffff.webp"]}
    things = []
    for split in ("train", emoji.HELD_OUT):
        captions = [record.captions[0] for record in sources.open_stored(f"{tmp_path / 'out'}@{split}")]
        things.append({caption.split(",")[0] for caption in captions})
        assert len(captions) == 3 * len(things[-1])
    assert things[1] and not things[0] & things[1] and len(things[0] | things[1]) == 60
    assert emoji.caption("flag: Norway") == "flag of Norway"
    assert emoji.caption("handshake: light skin tone, dark skin tone") == "handshake, light skin tone, dark skin tone"
    assert emoji.is_held_out("handshake: light skin tone, dark skin tone") == emoji.is_held_out("handshake")
    with pytest.raises(FileNotFoundError, match="has no package"):
        builders.build("emoji", tmp_path / "none", source=tmp_path / "out")


@pytest.mark.parametrize("exchanged", [False, True])
def test_emoji_are_called_by_the_skin_tone_they_show(exchanged: bool, tmp_path: Path) -> None:
    """The package has two tones at each other's code points in most emoji, not in couples; its thumbs tell whether."""
    pictures, names = _packages(tmp_path)
    things = {"1F44D": "thumbs up", "1F44B": "waving hand", "1F46B": "couple", "1F6B5": "cyclist"}
    entries = []
    for code, name in things.items():
        skins = [{"label": f"{name}: {tone} skin tone", "hexcode": f"{code}-{mark}"} for mark, tone in TONES.items()]
        entries.append({"label": name, "hexcode": code, "skins": skins})
        greys = [200, 120, 160, 80, 40] if exchanged and name != "couple" else [200, 160, 120, 80, 40]
        for mark, grey in zip(TONES, greys, strict=True):
            Image.new("RGB", (8, 8), (grey, grey, grey)).save(pictures / f"{code}-{mark}.webp".lower(), lossless=True)
    (names / "data.json").write_text(json.dumps(entries))
    opened = emoji.open_emoji(tmp_path)
    left_out = {"another skin tone than its name says": [f"1f6b5-{mark.lower()}.webp" for mark in TONES]}
    assert opened.left_out == (left_out if exchanged else {})
    shown = {
        (row.caption.split(",")[0], row.caption.split(", ")[1]): Image.open(row.path).getpixel((0, 0))[0]
        for rows in opened.splits.values()
        for row in rows
    }
    assert len(shown) == (15 if exchanged else 20)
    for thing in ("thumbs up", "waving hand", "couple"):
        assert [shown[thing, f"{tone} skin tone"] for tone in TONES.values()] == [200, 160, 120, 80, 40]
