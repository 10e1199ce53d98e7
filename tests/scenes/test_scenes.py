"""Scenes: always the same, the same at every size, and what the labels say is what the pixels show."""

from __future__ import annotations

import colorsys
import itertools

import jax
import numpy as np
import pytest
from drawn_scenes import draw_scenes

from if_jax.scenes import geometry, glyphs, grammar, raycast, sampling
from if_jax.scenes.scene import COLOURS, MATERIALS, SHAPES, SIZES, WORDS, Scene, as_numpy

MANY = 4000


@pytest.fixture(scope="module")
def many() -> list[Scene]:
    return as_numpy(sampling.sample_scenes(np.arange(MANY), 5))


def _shrink(pictures: np.ndarray, size: int) -> np.ndarray:
    batch, side = pictures.shape[:2]
    step = side // size
    return pictures.reshape(batch, size, step, size, step, 3).astype(np.float64).mean((2, 4))


def test_a_scene_looks_alike_at_64_256_and_1024_px() -> None:
    # Indices 4 and 16 of seed 0 hold a sign, the finest detail there is.
    drawn = sampling.sample_scenes(np.asarray([4, 12, 16, 5]), 0)
    assert (np.asarray(drawn.letters[:, 0]) >= 0).sum() == 2
    small, large = (np.asarray(raycast.render_scenes(drawn, size)) for size in (64, 256))
    first = jax.tree.map(lambda field: field[:1], drawn)
    huge = np.asarray(raycast.render_scenes(first, 1024))
    assert small.shape == (4, 64, 64, 3) and small.dtype == np.uint8
    for a, b in ((small, _shrink(large, 64)), (large[:1], _shrink(huge, 256)), (small[:1], _shrink(huge, 64))):
        difference = a - b  # of 255; four rays a pixel against many: edges differ, areas do not
        assert abs(difference.mean()) < 0.1
        assert np.abs(difference).mean() < 1.2
        assert np.quantile(np.abs(difference), 0.9) < 2


def test_a_scene_depends_on_seed_and_number_only() -> None:
    together = np.asarray(draw_scenes(np.arange(8), 3, 16))
    backwards = np.asarray(draw_scenes(np.arange(8)[::-1], 3, 16))
    np.testing.assert_array_equal(together, backwards[::-1])
    among_others = np.asarray(draw_scenes(np.asarray([5, 90, 0, 91, 7, 92, 2, 93]), 3, 16))
    np.testing.assert_array_equal(together[[5, 0, 7, 2]], among_others[::2])
    assert (together != np.asarray(draw_scenes(np.arange(8), 4, 16))).any(axis=(1, 2, 3)).all()


def test_one_after_another_and_all_at_once_draw_the_same() -> None:
    """Accelerators vectorise over scenes, CPUs loop over them."""
    drawn = sampling.sample_scenes(np.arange(8), 3)
    at_once = jax.jit(jax.vmap(lambda scene: raycast.render(scene, 16)))(drawn)
    assert float(at_once.min()) >= -1.0 and float(at_once.max()) <= 1.0
    looped = np.asarray(raycast.render_scenes(drawn, 16), np.float32) / 127.5 - 1.0
    differs = np.abs(at_once - looped) > 1.5 / 127.5
    assert differs.mean() < 0.02  # at 16 px some rays pass exactly along a sign's edge: rounding decides


def test_objects_stand_apart_and_inside_the_picture(many: list[Scene]) -> None:
    for scene in many:
        slots = np.flatnonzero(scene.valid)
        footprint = np.asarray(geometry.RADII)[scene.size] * np.asarray(geometry.GROUND_SCALE)[scene.shape]
        for a, b in itertools.combinations(slots, 2):
            assert np.linalg.norm(scene.position[a] - scene.position[b]) > footprint[a] + footprint[b]
        seen = np.asarray([item["seen"] for item in grammar.labels(scene)["objects"]])
        assert ((seen > 0.05) & (seen < 0.95)).all()


def test_scenes_are_as_varied_as_intended(many: list[Scene]) -> None:
    objects = np.asarray([scene.valid.sum() for scene in many])
    signs = [grammar.word(scene) for scene in many if grammar.word(scene)]
    assert abs(len(signs) / MANY - 1 / 6) < 0.03
    assert set(signs) == set(WORDS)
    assert 0.7 < (np.abs(objects - 2) <= 1).mean() < 0.9  # mostly one to three
    assert set(objects) == set(range(7))
    kinds = {(s.shape[0], s.colour[0], s.size[0], s.material[0]) for s in many if s.valid[0]}
    assert len(kinds) == len(SHAPES) * len(COLOURS) * len(SIZES) * len(MATERIALS)


def test_the_colour_at_an_objects_middle_is_its_label(many: list[Scene]) -> None:
    hues = {name: colorsys.rgb_to_hsv(*rgb)[0] for name, rgb in zip(COLOURS, raycast.PALETTE, strict=True)}
    pictures = np.concatenate([draw_scenes(np.arange(i, i + 4), 5, 64) for i in range(0, 64, 4)]) / 255.0
    checked = 0
    for scene, picture in zip(many, pictures, strict=False):
        for item in grammar.labels(scene)["objects"]:
            if _is_hidden(item, scene):
                continue
            column, row = (int(64 * share) for share in item["seen"])
            r, g, b = picture[row - 1 : row + 2, column - 1 : column + 2].mean((0, 1))
            hue, saturation, _ = colorsys.rgb_to_hsv(r, g, b)
            assert saturation > 0.25, (item, r, g, b)  # the floor has none
            away = {name: min(abs(hue - h), 1 - abs(hue - h)) for name, h in hues.items()}
            assert min(away, key=away.__getitem__) == item["colour"], (item, r, g, b)
            checked += 1
    assert checked > 100


def test_large_is_larger_and_metal_shines() -> None:
    sizes, materials = np.asarray([0, 1, 1, 1]), np.asarray([0, 0, 1, 1])
    spread = lambda values: np.repeat(np.asarray(values)[:, None], 6, axis=1)  # noqa: E731
    drawn = sampling.sample_scenes(np.arange(4), 0)._replace(
        valid=spread([True] * 4) & (np.arange(6) == 0),
        letters=np.full((4, 5), -1, np.int32),
        position=np.zeros((4, 6, 2), np.float32),
        size=spread(sizes),
        material=spread(materials),
        colour=spread([COLOURS.index("blue")] * 4),
    )
    for shape in range(len(SHAPES)):
        pictures = np.asarray(raycast.render_scenes(drawn._replace(shape=spread([shape] * 4)), 64)) / 255.0
        blue = pictures[..., 2] - pictures[..., 0] > 0.1
        small, large = (blue[i].any(axis=0).mean() for i in range(2))  # shares of the picture's width
        assert 0.15 < small < 0.3 and 0.28 < large < 0.45
        inner = pictures[1:3, 22:36, 27:38, 0]  # of the large one, rubber and metal; red shows white light only
        assert inner[1].max() > inner[0].max() + 0.1


def test_letters_are_distinct_and_the_same_at_every_resolution() -> None:
    coarse, advance = glyphs.atlas(16)
    fine, _ = glyphs.atlas(128)
    assert coarse.shape == (26, 16, 16) and advance.shape == (26,) and (advance > 0.2).all()
    np.testing.assert_allclose(fine.reshape(26, 16, 8, 16, 8).mean((2, 4)), coarse, atol=1e-5)
    for a, b in itertools.combinations(range(26), 2):
        assert np.abs(coarse[a] - coarse[b]).mean() > 0.01
    with pytest.raises(ValueError, match="divisor of 256"):
        glyphs.atlas(20)


def _is_hidden(item: dict, scene: Scene) -> bool:
    """Whether another object nearer to the camera may cover the middle of this one."""
    for other in grammar.labels(scene)["objects"]:
        nearer = other["floor"][1] < item["floor"][1]
        reach = 1.5 * geometry.RADII[SIZES.index(other["size"])] / 4.8
        if nearer and np.hypot(*np.subtract(other["seen"], item["seen"])) < reach:
            return True
    return False
