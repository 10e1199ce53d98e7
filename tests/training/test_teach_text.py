"""A text encoder learns to read scene captions: what captions say, and the folder that is written."""

import json
import sys

import numpy as np
import pytest
import tiny

from if_jax.checkpoints.release import read_text_encoder
from if_jax.text.tokens import ByteTokenizer
from if_jax.training import teach_text
from if_jax.training.teach_text import FIELDS, said


def words(row):
    return {name: names[i] for i, (name, names) in zip(row, FIELDS.items(), strict=True)}


def test_each_byte_says_all_of_its_group_and_none_outside():
    caption = "a photo of two large red metal spheres to the left of a cube"
    found = said(caption, 77)
    first, second = map(words, found.of_groups[:2])
    asked = dict(number="two", size="large", colour="red", material="metal", shape="sphere", place="left of")
    assert first == asked
    assert second == dict(number="one", size="", colour="", material="", shape="cube", place="right of")
    assert not found.of_groups[2:].any()
    start, stop = caption.index("two"), caption.index(" to the")
    np.testing.assert_array_equal(found.of_bytes[start:stop], np.tile(found.of_groups[0], (stop - start, 1)))
    assert not found.of_bytes[:start].any() and not found.of_bytes[stop : caption.index("a cube")].any()
    assert not found.of_bytes[len(caption) :].any()


@pytest.mark.parametrize("caption", ["an empty floor", "a sign that says stop", ""])
def test_a_caption_without_objects_says_nothing(caption):
    assert not any(part.any() for part in said(caption, 77))


def test_every_caption_of_the_grammars_is_understood():
    """The groups that are read out of a caption are those of its scene, in some order."""
    rng = np.random.default_rng(0)
    for described in teach_text._scenes(96):
        scene = described[0]
        rows = said(teach_text._describe(described, rng), 77).of_groups
        told = sorted((row["number"], row["shape"]) for row in map(words, rows) if row["number"] != "no")
        groups = teach_text.grammar.groups(scene)
        assert told == sorted((teach_text.grammar.NUMBERS[len(g.slots)], g.shape) for g in groups)


def test_the_command_writes_an_encoder_that_a_recipe_can_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(teach_text.T5_ENCODERS, "tiny", tiny.TEXT)
    out = tmp_path / "encoders/tiny"
    losses, step = [], teach_text._step
    monkeypatch.setattr(teach_text, "_step", lambda *a, **k: losses.append(float((found := step(*a, **k))[2])) or found)
    command = ["teach_text", str(out), "--encoder", "tiny", "--steps", "60", "--scenes", "96"]
    monkeypatch.setattr(sys, "argv", command)
    teach_text.main()
    assert losses[-1] < 0.6 * losses[0]
    assert set(json.loads(capsys.readouterr().out)) == {"bytes", "captions"}
    text = read_text_encoder(out)
    assert text.config == tiny.TEXT and isinstance(text.tokenizer, ByteTokenizer)

    with pytest.raises(SystemExit):
        teach_text.main()
    assert "exists" in capsys.readouterr().err


def test_an_encoder_that_does_not_read_bytes_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["teach_text", str(tmp_path / "out"), "--encoder", "t5-v1_1-small"])
    with pytest.raises(SystemExit):
        teach_text.main()
    assert "byte-level" in capsys.readouterr().err and not (tmp_path / "out").exists()
