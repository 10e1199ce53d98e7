"""The rules, on readings made by hand."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from if_jax.evaluation.statistics import wilson
from if_jax.evaluation.synth import ocr, scoring
from if_jax.evaluation.synth.eval_prompts import make_prompt
from if_jax.evaluation.synth.reading import DetectedObject


def detected(shape, colour="red", right=0.0, away=0.0, size="small", material="rubber") -> DetectedObject:
    return DetectedObject(shape, colour, size, material, right, away, (0.5, 0.5), 1.0)


@pytest.mark.parametrize(
    ("caption", "objects", "strict", "loose"),
    [
        ("a cube", [detected("cube", "blue")], True, True),
        ("a cube", [detected("sphere")], False, False),
        ("a cube", [detected(None)], False, False),  # the reader is not sure
        ("a cube", [], False, False),
        ("a cube", [detected("cube"), detected("sphere")], False, True),
        ("a red cube and a blue sphere", [detected("cube"), detected("sphere", "blue")], True, True),
        ("a red cube and a blue sphere", [detected("cube", "blue"), detected("sphere")], False, False),
        ("three red cubes", [detected("cube")] * 3, True, True),
        ("three red cubes", [detected("cube")] * 4, False, False),
        ("three red cubes", [detected("cube")] * 2 + [detected("cube", "pink")], False, False),
        ("a small metal cube", [detected("cube", material="metal")], True, True),
        ("a large metal cube", [detected("cube", material="metal")], False, False),
    ],
)
def test_a_picture_is_right_where_it_shows_what_is_asked(caption, objects, strict, loose):
    prompt = make_prompt(caption, "count" if "three" in caption else "single")
    assert scoring.is_right(prompt, objects) == strict
    assert scoring.is_right(prompt, objects, loose=True) == loose


@pytest.mark.parametrize(
    ("relation", "a", "b"),
    [
        ("left of", (-1.0, 0.0), (1.0, 0.0)),
        ("right of", (1.0, 0.0), (-1.0, 0.0)),
        ("in front of", (0.0, -1.0), (0.0, 1.0)),
        ("behind", (0.0, 1.0), (0.0, -1.0)),
    ],
)
def test_relations_hold_one_way_and_by_a_margin(relation, a, b):
    prompt = make_prompt(f"a cube {relation} a sphere", "position")
    assert scoring.is_right(
        prompt, [detected("cube", right=a[0], away=a[1]), detected("sphere", right=b[0], away=b[1])]
    )
    assert not scoring.is_right(
        prompt, [detected("cube", right=b[0], away=b[1]), detected("sphere", right=a[0], away=a[1])]
    )
    hardly = scoring.MARGIN / 3
    near = [
        detected("cube", right=hardly * a[0], away=hardly * a[1]),
        detected("sphere", right=hardly * b[0], away=hardly * b[1]),
    ]
    assert not scoring.is_right(prompt, near)


def test_overall_is_the_mean_of_the_six_tasks():
    prompts = [
        make_prompt("a cube", skill) for skill in ("single", "two", "count", "colour", "position", "binding", "words")
    ]
    scores = scoring.skill_scores(prompts, [True, True, True, False, False, False, True])
    assert scores["overall"] == 0.5 and scores["single"] == 1.0 and scores["colour"] == 0.0
    assert scores["overall_ci"] == wilson(3, 6)


def test_the_gap_compares_prompts_that_name_colours():
    captions = [("a red cube", "colour"), ("a cyan sphere", "colour", True), ("two cubes", "count")]
    prompts = [make_prompt(*parts) for parts in captions]
    assert scoring.unseen_gap(prompts, [True, False, False]) == 1.0
    assert scoring.unseen_gap(prompts[:1], [True]) is None


def test_words_are_exact_caseless_or_so_many_letters_off():
    scores = scoring.word_scores(["moon", "stop", "hi"], ["MOON", "stop", "HL"])
    assert scores["exact"] == pytest.approx(1 / 3, abs=1e-4) and scores["caseless"] == pytest.approx(2 / 3, abs=1e-4)
    assert scores["cer"] == 0.1
    assert scoring.word_scores(["moon"], [""])["cer"] == 1.0


def test_small_pictures_are_enlarged_and_spaces_dropped():
    sizes = []

    def reader(picture):
        sizes.append(picture.size)
        return " MO ON.\n"

    assert ocr.read_words(reader, [Image.new("RGB", (64, 64)), Image.new("RGB", (512, 512))]) == ["MOON", "MOON"]
    assert sizes == [(256, 256), (512, 512)]


def test_the_sides_of_a_sign_are_no_letters():
    picture = np.full((64, 64, 3), 255, np.uint8)
    picture[2:17, 10:12] = picture[2:17, 50:52] = 64  # the board's sides
    picture[5:14, 30] = 13  # a letter
    line = np.asarray(ocr.sign_of(Image.fromarray(picture)))
    assert line.shape == (96, 512)
    columns = np.flatnonzero(line.min(axis=0) < 128) / 8
    assert columns.min() > 29 and columns.max() < 32
