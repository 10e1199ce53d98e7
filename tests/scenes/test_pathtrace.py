"""Scenes through Mitsuba: what stands where, and in which colour, is what the ray caster draws and the labels say."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from click.testing import CliRunner

from if_jax.cli import main
from if_jax.data import builders, sources
from if_jax.scenes import geometry, glyphs, pathtrace, raycast
from if_jax.scenes.scene import Scene

SIDE = 64
needs_mitsuba = pytest.mark.skipif(importlib.util.find_spec("mitsuba") is None, reason="needs the extra mitsuba")


@pytest.fixture(scope="module")
def crowd() -> Scene:
    """Six solids that cover one another: every shape as rubber and as metal, turned, in six colours, and a sign."""
    return Scene(
        valid=np.ones(6, bool),
        group=np.arange(6, dtype=np.int32),
        shape=np.asarray([0, 1, 2, 0, 1, 2], np.int32),
        colour=np.asarray([0, 2, 3, 5, 4, 7], np.int32),
        size=np.asarray([1, 0, 1, 0, 1, 0], np.int32),
        material=np.asarray([0, 0, 0, 1, 1, 1], np.int32),
        position=np.asarray(
            [[-1.3, -0.2], [-0.3, -1.2], [1.2, 0.4], [0.75, -1.3], [-0.1, 0.6], [1.5, -0.9]], np.float32
        ),
        yaw=np.asarray([0.0, 0.5, 0.0, 0.0, -0.3, 0.0], np.float32),
        letters=np.asarray([glyphs.ALPHABET.index(letter) for letter in "STAR"] + [-1], np.int32),
        sign_x=np.float32(0.3),
        tone=np.float32(1.0),
    )


def _slots(scene: Scene) -> np.ndarray:
    """(64, 64) which object the ray caster sees; -1 floor, -2 board."""
    ray, solids = geometry.rays(SIDE), geometry.place_solids(scene)
    hit = geometry.bare_floor(ray)
    for i in range(6):
        hit = geometry.nearer(scene, solids, i, ray, hit)
    on_board = geometry.find_board(scene, ray).met & (hit.t > geometry.SIGN_DEPTH)
    return np.where(np.asarray(on_board), -2, np.asarray(hit.slot))


@needs_mitsuba
@pytest.mark.slow
def test_silhouettes_are_the_ray_casters(crowd: Scene) -> None:
    import mitsuba as mi

    mi.set_variant("scalar_rgb")
    world = mi.load_dict(pathtrace.describe(crowd, SIDE))
    camera = world.sensors()[0]

    def seen(row: int, column: int) -> int:
        ray, _ = camera.sample_ray(0.0, 0.5, mi.Point2f((column + 0.5) / SIDE, (row + 0.5) / SIDE), mi.Point2f(0.5))
        kind, _, slot = world.ray_intersect(ray).shape.id().partition("-")
        return int(slot) if kind in ("object", "lid") else {"board": -2}.get(kind, -1)

    ours, theirs = _slots(crowd), np.asarray([[seen(row, column) for column in range(SIDE)] for row in range(SIDE)])
    assert set(np.unique(ours)) == {-2, -1, 0, 1, 2, 3, 4, 5}
    for slot in (-2, 0, 1, 2, 3, 4, 5):
        overlap = ((ours == slot) & (theirs == slot)).sum() / ((ours == slot) | (theirs == slot)).sum()
        assert overlap > 0.97, (slot, overlap)


@needs_mitsuba
def test_colours_and_word_are_those_of_the_scene_and_bytes_repeat(crowd: Scene) -> None:
    picture, slots = pathtrace.render(crowd, SIDE, seed=3, samples=9), _slots(crowd)
    assert picture.shape == (SIDE, SIDE, 3) and picture.dtype == np.uint8
    hues = raycast.PALETTE - raycast.PALETTE.mean(1, keepdims=True)
    hues /= np.linalg.norm(hues, axis=1, keepdims=True)
    for slot in range(6):
        colour = picture[slots == slot].mean(0)
        assert np.argmax(hues @ (colour - colour.mean())) == crowd.colour[slot], (slot, colour)
    ours = np.asarray(jax.jit(raycast.render, static_argnums=1)(crowd, SIDE))
    board = slots == -2
    assert np.corrcoef(picture[board].mean(-1), ours[board].mean(-1))[0, 1] > 0.95  # upright and not mirrored
    np.testing.assert_array_equal(pathtrace.render(crowd, SIDE, seed=3, samples=9), picture)


@needs_mitsuba
def test_a_built_set_has_the_records_of_the_ray_cast_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builders, "_PER_SLOW_SHARD", 2)
    built = {}
    for renderer in ("raycast", "mitsuba"):
        report = builders.build("scenes", tmp_path / renderer, count=3, size=16, seed=3, renderer=renderer, workers=1)
        opened = sources.open_stored(str(tmp_path / renderer))
        source = tfds.builder_from_directory(str(tmp_path / renderer)).as_data_source(split="train")
        labels = {record["caption"]: json.loads(record["labels"]) for record in source}
        built[renderer] = {
            record.captions[0]: (labels[record.captions[0].encode()], record.picture) for record in opened
        }
    assert "mitsuba" in str(report) and len(list((tmp_path / "mitsuba").glob("*array_record*"))) == 2
    cast, traced = built["raycast"], built["mitsuba"]
    assert {caption: labels for caption, (labels, _) in cast.items()} == {
        c: labels for c, (labels, _) in traced.items()
    }
    assert all(cast[caption][1] != traced[caption][1] for caption in cast)


def test_without_mitsuba_one_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mitsuba", None)
    command = ["data", "build", "tasks", "--renderer", "mitsuba", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1 and result.output.count("\n") == 1
    assert "pip install 'if_jax[mitsuba]'" in result.output and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="only scenes and tasks"):
        builders.build("emoji", tmp_path / "out", renderer="mitsuba")
