"""The sources that are drawn rather than stored: scene number i of a seed, for as many as one likes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from if_jax.scenes import dipped, grammar, pathtrace, raycast, sampling, tasks
from if_jax.scenes.scene import Scene, as_numpy


class _Source(NamedTuple):
    """The functions of one source: they sample scenes, each with its task, and caption and label one of them."""

    sample: Callable[[np.ndarray, int], tuple[Scene, jax.Array | np.ndarray]]  # indices, seed
    caption: Callable[[Scene, int, np.random.Generator], str]
    labels: Callable[[Scene, int], dict[str, Any]]
    dipped: bool = False  # its objects are, in black paint


def _without_tasks(sample: Callable[..., Scene], caption: Callable[[Scene, np.random.Generator], str]) -> _Source:
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
    "dipped": _without_tasks(dipped.sample_dipped, dipped.caption)._replace(dipped=True),
    "tasks": _of_tasks(held_out=False),
    f"tasks@{tasks.HELD_OUT}": _of_tasks(held_out=True),
}
NAMES = tuple(_SOURCES)
RENDERERS = ("raycast", "mitsuba")


def draw(
    name: str,
    numbers: Sequence[int] | np.ndarray,
    seed: int,
    size: int,
    *,
    with_labels: bool = False,
    renderer: str = RENDERERS[0],
) -> Iterator[tuple[np.ndarray, str, dict[str, Any] | None]]:
    """Draw and describe scenes of a source.

    Args:
      name: one of `NAMES`.
      numbers: which scenes of the seed.
      seed: another seed has other scenes.
      size: side of the pictures in pixels.
      with_labels: give the labels too.
      renderer: one of `RENDERERS`; "mitsuba" takes seconds a picture.

    Yields:
      Picture (size, size, 3) uint8, caption, and labels or None.

    Raises:
      ValueError: Mitsuba is asked for dipped solids, which it does not draw.
    """
    indices = np.asarray(numbers, np.int64)
    source = _SOURCES[name]
    if source.dipped and renderer != RENDERERS[0]:
        raise ValueError(f"renderer {renderer} does not draw {name!r}: use {RENDERERS[0]}")
    batch, kinds = source.sample(indices, seed)
    scenes = list(zip(indices.tolist(), as_numpy(batch), np.asarray(kinds).tolist(), strict=True))
    # The ray caster's pictures are made while the captions are written; each of Mitsuba's when it is asked for.
    painted = dipped.which(batch) if source.dipped else None
    pictures = raycast.render_scenes(batch, size, painted) if renderer == "raycast" else None
    texts = []
    for number, scene, task in scenes:
        caption = source.caption(scene, task, np.random.default_rng((seed, number)))
        texts.append((caption, source.labels(scene, task) if with_labels else None))
    if pictures is None:
        finished = (pathtrace.render(scene, size, number) for number, scene, _ in scenes)
    else:
        finished = iter(np.asarray(pictures))
    for picture, (caption, labels) in zip(finished, texts, strict=True):
        yield picture, caption, labels
