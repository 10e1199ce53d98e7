"""Each use of randomness has a stream of its own: no two give the same values."""

from __future__ import annotations

import dataclasses
from itertools import combinations

import jax
import numpy as np
from test_step import SUPER_RESOLUTION

from if_jax.training import randomness

RECIPE = dataclasses.replace(SUPER_RESOLUTION, pooled_dropout=0.5)


def test_no_two_streams_give_equal_values():
    root, step = jax.random.key(RECIPE.seed), randomness.step_key(RECIPE.seed, 3)
    keys = {
        (i, name): randomness.stream(key, name) for i, key in enumerate((root, step)) for name in randomness.STREAMS
    }
    keys |= {"the seed": root, "a step": step, "another step": randomness.step_key(RECIPE.seed, 4)}
    bits = {name: np.asarray(jax.random.bits(key, (8,))) for name, key in keys.items()}
    for a, b in combinations(bits, 2):
        assert not np.intersect1d(bits[a], bits[b]).size, (a, b)


def test_a_step_takes_each_stream_once(monkeypatch):
    names, stream = [], randomness.stream
    monkeypatch.setattr(randomness, "stream", lambda key, name: names.append(name) or stream(key, name))
    drawn = randomness.draw(RECIPE, 64, jax.random.key(0))
    assert len(names) == len(set(names)) == len(drawn) == 7
    assert {leaf.shape[0] for leaf in drawn.values()} == {64}
    # What once was so: a picture lost its pooled text where the sign of its first noise value said so.
    kept, signs = np.asarray(drawn["pooled_kept"]), np.sign(np.asarray(drawn["eps"]).reshape(64, -1)[:, :64]) > 0
    agreement = (kept[:, None] == signs).mean(0)
    assert agreement.min() > 0.2 and agreement.max() < 0.8
    assert abs(np.corrcoef(np.ravel(drawn["eps"]), np.ravel(drawn["low_eps"]))[0, 1]) < 0.02


def test_low_resolution_pictures_are_noised_no_further_than_asked():
    recipe = dataclasses.replace(RECIPE, data=dataclasses.replace(RECIPE.data, max_aug_level=20))
    levels = np.asarray(randomness.draw(recipe, 512, jax.random.key(0))["level"])
    assert levels.min() == 0 and levels.max() == 20
