"""CLEVR through TensorFlow Datasets' own schema: captions composed of the objects, true of what they describe."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import record_stores
import tensorflow_datasets as tfds
from drawn_scenes import draw_scenes
from PIL import Image

from if_jax.data import clevr, sources
from if_jax.scenes import geometry, grammar, sampling
from if_jax.scenes.scene import RELATIONS, SIZES, as_numpy

_NUMBERS = ("a", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_RELATION = re.compile(" (left of|right of|in front of|behind) ")
_THING = re.compile(
    rf"(?P<number>an|{'|'.join(_NUMBERS)})(?: (?P<size>{'|'.join(clevr.SIZES)}))?"
    rf"(?: (?P<colour>{'|'.join(clevr.COLOURS)}))?(?: (?P<material>{'|'.join(clevr.MATERIALS)}))?"
    rf" (?P<shape>{'|'.join(clevr.SHAPES)}|object)(?P<plural>s?)"
)


@pytest.fixture(scope="module")
def drawn() -> dict[bytes, dict[str, Any]]:
    """Labels of 16 drawn scenes in CLEVR's colours, none with a sign, by the PNG that shows them."""
    chunks = np.arange(48).reshape(-1, 8)
    described = [scene for chunk in chunks for scene in as_numpy(sampling.sample_scenes(chunk, 3))]
    pictures = np.concatenate([draw_scenes(chunk, 3, 16) for chunk in chunks])
    labels_of = {}
    for scene, picture in zip(described, pictures, strict=True):
        labels = grammar.labels(scene) | {"turned": np.degrees(scene.yaw[scene.valid]).tolist()}
        if labels["word"] is None and set(labels["colours"]) <= set(clevr.COLOURS):
            labels_of[record_stores.encoded(Image.fromarray(picture))] = labels
    return dict(list(labels_of.items())[:16])


def test_our_scenes_in_clevrs_layout_get_captions_that_agree_with_their_labels(
    drawn: dict[bytes, dict[str, Any]], tmp_path: Path
) -> None:
    _prepare([_example(f"CLEVR_train_{i:06d}.png", *each) for i, each in enumerate(drawn.items())], tmp_path)
    opened = sources.open_stored(str(tmp_path / "clevr"))
    assert len(opened) == len(drawn) == 16 and not opened.left_out
    relations, counts = set(), set()
    for record in opened:
        labels = drawn[record.picture]
        things = labels["objects"]
        counts.add(len(things))
        for caption in record.captions:
            if related := _RELATION.search(caption):
                a, b = (_matching(part, things) for part in (caption[: related.start()], caption[related.end() :]))
                assert len(a) == len(b) == 1, caption
                assert [a[0]["group"], related[1], b[0]["group"]] in labels["relations"], caption
                relations.add(related[1])
            elif things:
                _check_list(caption, things)
            else:
                assert caption == "an empty scene"
    assert relations == set(RELATIONS) and len(counts) > 3


def test_mock_data_with_consistent_fields_gets_captions_that_are_exactly_true(tmp_path: Path) -> None:
    """`mock_data` needs no TensorFlow but draws each field alone, even its length, and writes no records: what it gives
    is cut to one length, given places, and written by the real builder's own writer.
    """
    rng = np.random.default_rng(5)
    with tfds.testing.mock_data(num_examples=33):
        mocked = tfds.data_source("clevr", split="train")
        examples = [_made_consistent(mocked[i], most=i % 11, rng=rng) for i in range(33)]
        features = tfds.builder("clevr").info.features
    _prepare(examples, tmp_path)
    things_of = {example["image"].getvalue(): _in_words(example["objects"], features) for example in examples}
    opened = sources.open_stored(str(tmp_path / "clevr"))
    assert len(opened) == len(examples) and not opened.left_out
    relations, counts = set(), set()
    for record in opened:
        things, captions = things_of[record.picture], list(record.captions)
        counts.add(len(things))
        number = ("an empty scene", "an object", *(f"{number} objects" for number in _NUMBERS[1:]))[len(things)]
        assert captions.pop(0).removeprefix("a scene with ") == number
        for caption in captions:
            related = _RELATION.search(caption)
            if not related:
                _check_list(caption, things)
                continue
            (a,), (b,) = (_matching(part, things) for part in (caption[: related.start()], caption[related.end() :]))
            (across, _, depth), relation = np.subtract(a["pixel_coords"], b["pixel_coords"]), related[1]
            gap = {"left of": -across, "right of": across, "in front of": -depth, "behind": depth}[relation]
            assert gap > 0, caption
            relations.add(relation)
            # Of two things alike one cannot say which; `_matching` has found each to be the only one of its kind.
        listed = "\n".join(caption for caption in captions if not _RELATION.search(caption))
        for field in ("shape", "colour", "material") if things else ():
            assert {thing[field] for thing in things} == set(_words_of(field, listed))  # nothing is missing
    assert relations == set(RELATIONS) and counts >= set(range(8))


def _made_consistent(example: dict[str, Any], most: int, rng: np.random.Generator) -> dict[str, Any]:
    """A mocked example whose `objects` are of one number, each with a place in a picture of 480 x 320 px."""
    fields = ("color", "material", "shape", "size", "rotation")
    rows = zip(*(example["objects"][field][:most] for field in fields), strict=False)  # as many as the shortest has
    objects = [
        dict(zip(fields, row, strict=True))
        | {"3d_coords": [0, 0, 0], "pixel_coords": rng.uniform((20, 20, 8), (460, 300, 14)).tolist()}
        for row in rows
    ]
    picture = io.BytesIO(record_stores.encoded(Image.fromarray(example["image"])))
    return {"image": picture, "file_name": example["file_name"], "objects": objects, "question_answer": []}


def _in_words(objects: list[dict[str, Any]], features: tfds.features.FeaturesDict) -> list[dict[str, Any]]:
    names = _names(features)
    named = [{field: names[field][thing[field]] for field in names} for thing in objects]
    return [{**a, "colour": a["color"], "pixel_coords": b["pixel_coords"]} for a, b in zip(named, objects, strict=True)]


def _words_of(field: str, text: str) -> list[str]:
    known = {"shape": clevr.SHAPES, "colour": clevr.COLOURS, "material": clevr.MATERIALS}[field]
    return [word for word in known if re.search(rf"\b{word}s?\b", text)]


def _check_list(caption: str, things: list[dict[str, Any]]) -> None:
    """A list must be true part by part, and of all there is."""
    parts = re.split(", | and ", caption.removeprefix("a scene with "))
    assert sum(len(_matching(part, things)) for part in parts) == len(things), caption


def _prepare(examples: list[dict[str, Any]], folder: Path) -> None:
    """Write examples with TensorFlow Datasets' own writer and its own builder of CLEVR, which needs them alone."""

    class Drawn(tfds.builder_cls("clevr"), skip_registration=True):
        name = "clevr"

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
            yield from ((str(i), example) for i, example in enumerate(examples))

    Drawn(data_dir=str(folder), file_format="array_record").download_and_prepare()


def _example(name: str, png: bytes, labels: dict[str, Any]) -> dict[str, Any]:
    rows = zip(labels["objects"], labels["turned"], strict=True)
    return {
        "image": io.BytesIO(png),
        "file_name": name,
        "question_answer": [{"question": "How many objects are there?", "answer": str(len(labels["objects"]))}],
        "objects": [_in_clevrs_words(thing, turned) for thing, turned in rows],
    }


def _in_clevrs_words(thing: dict[str, Any], turned: float) -> dict[str, Any]:
    """An object as CLEVR tells it: in a picture 480 px wide, with its distance along the camera's axis."""
    x, y = thing["floor"]
    z = geometry.middle_height(SIZES.index(thing["size"]))
    down = math.radians(33)  # the camera looks
    depth = math.cos(down) * (y - geometry.EYE[1]) - math.sin(down) * (z - geometry.EYE[2])
    column, row = (480 * share for share in thing["seen"])
    same = {field: thing[field] for field in ("material", "shape", "size")}
    geometric = {"3d_coords": [x, y, z], "pixel_coords": [column, row, depth], "rotation": turned}
    return {"color": thing["colour"], **same, **geometric}


def _matching(phrase: str, things: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The labelled objects that a phrase such as "two red cubes" is true of; as many as it says."""
    match = _THING.fullmatch(phrase)
    assert match, phrase
    fields = [field for field in ("size", "colour", "material", "shape") if match[field] not in (None, "object")]
    matches = [thing for thing in things if all(thing[field] == match[field] for field in fields)]
    number = 1 if match["number"] == "an" else 1 + _NUMBERS.index(match["number"])
    assert len(matches) == number and bool(match["plural"]) == (number > 1), phrase
    return matches


def test_clevr_through_its_own_schema(tmp_path: Path) -> None:
    features = tfds.builder("clevr", data_dir=tmp_path).info.features
    colours, shapes = features["objects"]["color"].names, features["objects"]["shape"].names

    def thing(size: int, colour: str, material: int, shape: str, x: float, depth: float) -> dict:
        numbers = {"size": size, "color": colours.index(colour), "material": material, "shape": shapes.index(shape)}
        return numbers | {"rotation": 0.0, "3d_coords": [0, 0, 0], "pixel_coords": [x, 100, depth]}

    scenes = [
        [
            thing(1, "red", 1, "cube", 100, 9),
            thing(0, "cyan", 0, "sphere", 300, 12),
            thing(1, "red", 1, "cube", 200, 9),
        ],
        [thing(0, "gray", 1, "cylinder", 240, 8)],
    ]
    examples = [
        {
            "image": record_stores.encoded(record_stores.picture(i, (48, 32))),
            "file_name": f"{i}.png",
            "objects": objects,
            "question_answer": [],
        }
        for i, objects in enumerate(scenes)
    ]
    path = record_stores.write_prepared(tmp_path / "clevr" / "3.1.0", "clevr", features, examples)
    opened = sources.open_stored(str(path.parent))  # its one version is found
    assert set(opened[0].captions) >= {
        "a scene with three objects",
        "two cubes and a sphere",
        "two red cubes and a cyan sphere",
        "two red metal cubes and a cyan rubber sphere",
        "two large red metal cubes and a small cyan rubber sphere",
    }
    assert not any("left of a large red" in caption for caption in opened[0].captions)  # which of the two?
    assert opened[1].captions[-1] == "a small gray metal cylinder"
    first, other = scenes[0][:2]
    captions = clevr.captions({field: [first[field], other[field]] for field in clevr.FIELDS}, _names(features))
    assert "a large red metal cube left of a small cyan rubber sphere" in captions
    assert "a small cyan rubber sphere behind a large red metal cube" in captions
    assert not any("cube behind" in caption or "cube right of" in caption for caption in captions)


def _names(features: tfds.features.FeaturesDict) -> dict[str, tuple[str, ...]]:
    return {name: tuple(features["objects"][name].names) for name in ("color", "material", "shape", "size")}


def test_mock_data_of_no_meaning_is_left_out_not_lied_about() -> None:
    objects = {field: [0] * (i + 1) for i, field in enumerate(clevr.FIELDS)}
    with pytest.raises(ValueError, match="differ in length"):
        clevr.captions(objects)
    assert json.dumps(clevr.captions({field: [] for field in clevr.FIELDS})) == '["an empty scene"]'
