"""The sources that are drawn rather than stored: scene number i of a seed, for as many as one likes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from if_jax.scenes import grammar, pathtrace, raycast, sampling, tasks
from if_jax.scenes.scene import Scene, as_numpy


class _Source(NamedTuple):
    """How scenes are sampled, each with its task, and what is said of one."""

    sample: Callable[[np.ndarray, int], tuple[Scene, jax.Array | np.ndarray]]  # indices, seed
    caption: Callable[[Scene, int, np.random.Generator], str]
    labels: Callable[[Scene, int], dict]


def _without_tasks(
    sample: Callable[[np.ndarray, int], Scene], caption: Callable[[Scene, np.random.Generator], str]
) -> _Source:
    return _Source(
        lambda indices, seed: (sample(indices, seed), np.zeros(len(indices), np.int32)),
        lambda scene, _, rng: caption(scene, rng),
        lambda scene, _: grammar.labels(scene),
    )


def _of_tasks(held_out: bool) -> _Source:
    return _Source(functools.partial(tasks.sample_tasks, held_out=held_out), tasks.caption, tasks.labels)


_SOURCES = {
    "scenes": _without_tasks(sampling.sample_scenes, grammar.caption),
    "pairs": _without_tasks(tasks.sample_pairs, tasks.pair_caption),
    "tasks": _of_tasks(held_out=False),
    f"tasks@{tasks.HELD_OUT}": _of_tasks(held_out=True),
}
NAMES = tuple(_SOURCES)
RENDERERS = ("raycast", "mitsuba")


def draw(
    name: str, numbers: Sequence[int], seed: int, size: int, *, with_labels: bool = False, renderer: str = RENDERERS[0]
) -> Iterator[tuple[np.ndarray, str, dict | None]]:
    """Picture (size, size, 3) uint8, caption and, where asked for, labels of scenes `numbers` of a source."""
    indices = np.asarray(numbers, np.int64)
    source = _SOURCES[name]
    batch, kinds = source.sample(indices, seed)
    host = as_numpy(batch)
    if renderer == "raycast":
        pictures = raycast.render_scenes(batch, size)  # runs while the captions are written
    told = []
    for number, scene, kind in zip(indices.tolist(), host, np.asarray(kinds).tolist(), strict=True):
        text = source.caption(scene, kind, np.random.default_rng((seed, number)))
        told.append((text, source.labels(scene, kind) if with_labels else None))
    if renderer == "raycast":
        drawn = iter(np.asarray(pictures))
    else:  # seconds a picture: each when it is asked for
        drawn = (pathtrace.render(scene, size, number) for scene, number in zip(host, indices.tolist(), strict=True))
    for picture, (text, known) in zip(drawn, told, strict=True):
        yield picture, text, known
