"""A text encoder learns to read scene captions: what captions say, and the folder that is written."""

from __future__ import annotations

import json
import sys

import jax
import numpy as np
import pytest
import tiny

from if_jax.checkpoints.release import read_text_encoder
from if_jax.scenes import grammar
from if_jax.scenes.scene import NUMBERS
from if_jax.text.tokens import ByteTokenizer
from if_jax.training import teach_text
from if_jax.training.teach_text import FIELDS, caption_targets


def words(row):
    return {name: names[i] for i, (name, names) in zip(row, FIELDS.items(), strict=True)}


def test_each_byte_says_all_of_its_group_and_none_outside():
    caption = "a photo of two large red metal spheres to the left of a cube"
    targets = caption_targets(caption, 77)
    first, second = map(words, targets.of_groups[:2])
    assert first == dict(number="two", size="large", colour="red", material="metal", shape="sphere", place="left of")
    assert second == dict(number="one", size="", colour="", material="", shape="cube", place="right of")
    assert not targets.of_groups[2:].any()
    start, stop = caption.index("two"), caption.index(" to the")
    np.testing.assert_array_equal(targets.of_bytes[start:stop], np.tile(targets.of_groups[0], (stop - start, 1)))
    assert not targets.of_bytes[:start].any() and not targets.of_bytes[stop : caption.index("a cube")].any()
    assert not targets.of_bytes[len(caption) :].any()


@pytest.mark.parametrize("caption", ["an empty floor", "a sign that says stop", ""])
def test_a_caption_without_objects_says_nothing(caption):
    assert not any(part.any() for part in caption_targets(caption, 77))


def test_every_caption_of_the_grammars_is_understood():
    """Each group of a scene is said once, with its number and shape, and whatever else is said is true of it."""
    rng, said = np.random.default_rng(0), set()
    for scene, task in teach_text._scenes(96):
        targets = caption_targets(teach_text._describe(scene, task, rng), 77)
        rows = [words(row) for row in targets.of_groups if row.any()]
        left = grammar.groups(scene)
        assert len(rows) == len(left)
        for row in rows:
            looks = {name: row[name] for name in ("shape", "colour", "size", "material") if row[name]}
            [group] = [g for g in left if all(getattr(g, name) == value for name, value in looks.items())]
            assert row["number"] == NUMBERS[len(group.slots)]
            left.remove(group)
            if row["place"]:
                [other] = [g for g in grammar.groups(scene) if g != group]
                assert grammar.relation(group, other) == row["place"]
            said |= {*looks, *(["place"] if row["place"] else [])}
        of_bytes = {tuple(row) for row in targets.of_bytes if row.any()}
        assert of_bytes == {tuple(row) for row in targets.of_groups if row.any()}
    assert said == {*FIELDS} - {"number"}


def test_the_command_writes_an_encoder_that_a_recipe_can_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(teach_text.T5_ENCODERS, "tiny", tiny.TEXT)
    out = tmp_path / "encoders/tiny"
    losses, trees, step = [], [], teach_text._step

    def recorded(trained, *args, **kwargs):
        if not trees:
            trees.append(jax.tree.map(np.array, trained))
        result = step(trained, *args, **kwargs)
        losses.append(float(result[2]))
        trees[1:] = [result[0]]
        return result

    monkeypatch.setattr(teach_text, "_step", recorded)
    command = ["teach_text", str(out), "--encoder", "tiny", "--steps", "60", "--scenes", "96"]
    monkeypatch.setattr(sys, "argv", command)
    teach_text.main()
    assert np.mean(losses[-5:]) < 0.6 * losses[0]
    assert set(json.loads(capsys.readouterr().out)) == {"bytes", "captions", "last_pad"}
    text = read_text_encoder(out)
    assert text.config == tiny.TEXT and isinstance(text.tokenizer, ByteTokenizer)
    (before, _), (after, _) = trees
    jax.tree.map(np.testing.assert_array_equal, text.params, after)
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, after)
    assert all(jax.tree.leaves(moved)), moved  # the heads did not learn it all by themselves

    with pytest.raises(SystemExit):
        teach_text.main()
    assert "exists" in capsys.readouterr().err


def test_an_encoder_that_does_not_read_bytes_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["teach_text", str(tmp_path / "out"), "--encoder", "t5-v1_1-small"])
    with pytest.raises(SystemExit):
        teach_text.main()
    assert "byte-level" in capsys.readouterr().err and not (tmp_path / "out").exists()
