"""The sample sheet in as many parts as memory asks for."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from if_jax.training import sampling


def _drawing(fits):
    sizes = []

    def draw(rows):
        sizes.append(len(rows))
        if len(rows) > fits:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return np.broadcast_to(rows[:, None, None, None], (len(rows), 2, 2, 3))

    return draw, sizes


@pytest.mark.parametrize(("fits", "sizes"), [(8, [5]), (4, [5, 3, 3]), (1, [5, 3, 2, 1, 1, 1, 1, 1])])
def test_half_as_many_pictures_are_drawn_where_memory_runs_out(fits, sizes):
    draw, seen = _drawing(fits)
    pictures = sampling._in_parts_that_fit(draw, 5)
    assert seen == sizes and pictures[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]


def test_a_single_picture_that_does_not_fit_is_an_error():
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        sampling._in_parts_that_fit(_drawing(0)[0], 2)
