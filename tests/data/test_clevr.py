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
import shelves
import tensorflow_datasets as tfds
from PIL import Image

from if_jax.data import clevr, geometry, grammar, scenes, sources

_NUMBERS = ("a", "two", "three", "four", "five", "six")
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
    described = [scene for chunk in chunks for scene in scenes.as_numpy(scenes.sample_scenes(chunk, 3))]
    pictures = np.concatenate([scenes.draw(chunk, 3, 16) for chunk in chunks])
    found = {}
    for scene, picture in zip(described, pictures, strict=True):
        labels = grammar.labels(scene) | {"turned": np.degrees(scene.yaw[scene.valid]).tolist()}
        if labels["word"] is None and set(labels["colours"]) <= set(clevr.COLOURS):
            found[shelves.encoded(Image.fromarray(picture))] = labels
    return dict(list(found.items())[:16])


def test_our_scenes_in_clevrs_layout_get_captions_that_agree_with_their_labels(
    drawn: dict[bytes, dict[str, Any]], tmp_path: Path
) -> None:
    _prepare(drawn, tmp_path)
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
            elif things:  # a list of all there is
                parts = re.split(", | and ", caption.removeprefix("a scene with "))
                assert sum(len(_matching(part, things)) for part in parts) == len(things), caption
            else:
                assert caption == "an empty scene"
    assert relations == set(grammar.RELATIONS) and len(counts) > 3


def _prepare(drawn: dict[bytes, dict[str, Any]], folder: Path) -> None:
    """Write scenes with TensorFlow Datasets' own writer and its own builder of CLEVR, which needs the examples only."""

    class Drawn(tfds.builder_cls("clevr"), skip_registration=True):
        name = "clevr"

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
            for i, (png, labels) in enumerate(drawn.items()):
                yield str(i), _example(f"CLEVR_train_{i:06d}.png", png, labels)

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
    z = geometry.middle_height(grammar.SIZES.index(thing["size"]))
    down = math.radians(33)  # the camera looks
    depth = math.cos(down) * (y - geometry.EYE[1]) - math.sin(down) * (z - geometry.EYE[2])
    column, row = (480 * share for share in thing["seen"])
    same = {field: thing[field] for field in ("material", "shape", "size")}
    placed = {"3d_coords": [x, y, z], "pixel_coords": [column, row, depth], "rotation": turned}
    return {"color": thing["colour"], **same, **placed}


def _matching(phrase: str, things: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The labelled objects that a phrase such as "two red cubes" is true of; as many as it says."""
    told = _THING.fullmatch(phrase)
    assert told, phrase
    fields = [field for field in ("size", "colour", "material", "shape") if told[field] not in (None, "object")]
    found = [thing for thing in things if all(thing[field] == told[field] for field in fields)]
    number = 1 if told["number"] == "an" else 1 + _NUMBERS.index(told["number"])
    assert len(found) == number and bool(told["plural"]) == (number > 1), phrase
    return found


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
            "image": shelves.encoded(shelves.picture(i, (48, 32))),
            "file_name": f"{i}.png",
            "objects": objects,
            "question_answer": [],
        }
        for i, objects in enumerate(scenes)
    ]
    path = shelves.write_prepared(tmp_path / "clevr" / "3.1.0", "clevr", features, examples)
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
    one, other = scenes[0][:2]
    told = clevr.captions({field: [one[field], other[field]] for field in clevr.FIELDS}, _names(features))
    assert "a large red metal cube left of a small cyan rubber sphere" in told
    assert "a small cyan rubber sphere behind a large red metal cube" in told
    assert not any("cube behind" in caption or "cube right of" in caption for caption in told)


def _names(features: tfds.features.FeaturesDict) -> dict[str, tuple[str, ...]]:
    return {name: tuple(features["objects"][name].names) for name in ("color", "material", "shape", "size")}


def test_mock_data_of_no_meaning_is_left_out_not_lied_about() -> None:
    objects = {field: [0] * (i + 1) for i, field in enumerate(clevr.FIELDS)}
    with pytest.raises(ValueError, match="differ in length"):
        clevr.captions(objects)
    assert json.dumps(clevr.captions({field: [] for field in clevr.FIELDS})) == '["an empty scene"]'
