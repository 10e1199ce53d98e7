"""The folders that DreamBooth trains on: all pictures with their caption, class pictures drawn once and kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from PIL import Image

from if_jax.checkpoints.release import write_cascade
from if_jax.data import pipeline
from if_jax.data.index import Filter
from if_jax.data.preprocessing import Preparation
from if_jax.inference import cascade as cascades
from if_jax.inference.subject import write_subject

PROMPTS = {"prompt": "a sks cube", "class_prompt": "a cube"}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("b.png", "a.jpg"):
        Image.effect_noise((20, 16), 80).convert("RGB").save(folder / name)
    (folder / "notes.txt").write_text("not a picture")
    return folder


def test_pictures_of_the_class_are_drawn_once_and_trained_on(pictures: Path, tmp_path: Path) -> None:
    release, out = tmp_path / "tiny", tmp_path / "subject"
    write_cascade(release, [tiny.on_one_level(stage) for stage in tiny.stages()], tiny.DEFAULTS)
    options = {**PROMPTS, "cascade": str(release)}
    assert write_subject(pictures, out, **options, count=3) == (2, 3)
    first = {path.name: path.read_bytes() for path in (out / "class").glob("*.png")}
    (out / "class/0001.png").unlink()
    assert write_subject(pictures, out, **options, count=4) == (2, 2)
    again = {path.name: path.read_bytes() for path in (out / "class").glob("*.png")}
    assert len(again) == 4 and all(again[name] == content for name, content in first.items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cascades.Cascade, "load", lambda *args, **kwargs: pytest.fail("nothing is missing"))
        assert write_subject(pictures, out, **options, count=4) == (2, 0)
    for name, caption, count in (("instance", "a sks cube", 2), ("class", "a cube", 4)):
        source = pipeline.open_source(str(out / name), 8, 0, Preparation(), Filter())
        assert {sample.caption for sample in source.read(range(count))} == {caption}
    with pytest.raises(ValueError, match="holds pictures drawn for prompt 'a cube', not 'a ball'"):
        write_subject(pictures, out, **(options | {"class_prompt": "a ball"}), count=4)
    assert len(list((out / "class").glob("*.png"))) == 4


def test_what_cannot_work_is_refused_before_anything_is_written(pictures: Path, tmp_path: Path) -> None:
    out, empty = tmp_path / "subject", tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="no such folder; give the folder of the subject's pictures"):
        write_subject(tmp_path / "gone", out, **PROMPTS)
    with pytest.raises(ValueError, match="holds no pictures: put 3 to 20"):
        write_subject(empty, out, **PROMPTS)
    with pytest.raises(ValueError, match="the first must name the subject by a word of its own"):
        write_subject(pictures, out, prompt="a cube", class_prompt="a cube")
    with pytest.raises(ValueError, match="count -1, stages 1"):
        write_subject(pictures, out, **PROMPTS, count=-1)
    assert not out.exists()
    (out / "class").mkdir(parents=True)
    with pytest.raises(ValueError, match="was not drawn here"):
        write_subject(pictures, out, **PROMPTS)
    assert not (out / "instance").exists()
