"""The dipped solids: what they look like, that nothing else does, and the measure that finds them."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from if_jax.scenes import dipped, raycast, sources, tasks
from if_jax.scenes.scene import as_numpy


def test_dipped_solids_are_seen_by_their_measure_and_nothing_else_is() -> None:
    """Validated on true renders without signs: every dipped one is found, and no other."""
    scenes, _ = tasks.sample_tasks(np.arange(160), 3)
    kept = np.flatnonzero(np.asarray(scenes.valid).any(1) & (np.asarray(scenes.letters)[:, 0] < 0))
    scenes = jax.tree.map(lambda field: field[kept], scenes)
    assert len(kept) > 100
    plain = np.asarray(raycast.render_scenes(scenes, 64))
    assert not dipped.is_dipped(plain).any() and dipped.dark_share(plain).max() < 0.05
    painted = np.asarray(raycast.render_scenes(scenes, 64, dipped.which(scenes)))
    assert dipped.is_dipped(painted).all() and dipped.dark_share(painted).min() > 0.15
    none = np.asarray(raycast.render_scenes(scenes, 64, np.zeros_like(scenes.valid)))
    assert np.abs(none.astype(int) - plain).max() <= 1  # another program rounds otherwise


def test_the_source_shows_and_names_one_solid() -> None:
    pictures, captions, labels = zip(*sources.draw("dipped", range(24), 5, 64, with_labels=True), strict=True)
    assert dipped.is_dipped(np.stack(pictures)).all()
    for caption, label, scene in zip(captions, labels, as_numpy(dipped.sample_dipped(np.arange(24), 5)), strict=True):
        (item,) = label["objects"]
        assert caption == dipped.describe(item["colour"], item["shape"]) and " sks " in caption
        assert not tasks.novelties(scene)
    assert dipped.describe("orange", "cube") == "an orange sks cube"
    again = next(iter(sources.draw("dipped", [7], 5, 64)))
    np.testing.assert_array_equal(again[0], pictures[7])
    with pytest.raises(ValueError, match="renderer mitsuba does not draw 'dipped'"):
        next(sources.draw("dipped", [0], 5, 64, renderer="mitsuba"))
