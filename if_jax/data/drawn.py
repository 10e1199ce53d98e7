"""The sources that are drawn rather than stored: scene number i of a seed, for as many as one likes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from if_jax.data import grammar, pathtrace, scenes, tasks

NAMES = ("scenes", "pairs", "tasks", f"tasks@{tasks.HELD_OUT}")
RENDERERS = ("raycast", "mitsuba")


def draw(
    name: str, numbers: Sequence[int], seed: int, size: int, *, with_labels: bool = False, renderer: str = RENDERERS[0]
) -> Iterator[tuple[np.ndarray, str, dict | None]]:
    """Picture (size, size, 3) uint8, caption and, where asked for, labels of scenes `numbers` of a source."""
    indices = np.asarray(numbers, np.int64)
    kinds: Sequence[int | None] = [None] * len(indices)
    describe = grammar.caption
    if name == "scenes":
        batch = scenes.sample_scenes(indices, seed)
    elif name == "pairs":
        batch, describe = tasks.sample_pairs(indices, seed), tasks.pair_caption
    else:
        batch, drawn = tasks.sample_tasks(indices, seed, held_out=name.endswith(tasks.HELD_OUT))
        kinds = np.asarray(drawn).tolist()
    host = scenes.as_numpy(batch)
    if renderer == "raycast":
        pictures = scenes.render_scenes(batch, size)  # runs while the captions are written
    told = []
    for number, scene, kind in zip(indices.tolist(), host, kinds, strict=True):
        rng = np.random.default_rng((seed, number))
        text = describe(scene, rng) if kind is None else tasks.caption(scene, kind, rng)
        known = None
        if with_labels:
            known = grammar.labels(scene) if kind is None else tasks.labels(scene, kind)
        told.append((text, known))
    if renderer == "raycast":
        drawn = iter(np.asarray(pictures))
    else:  # seconds a picture: each when it is asked for
        drawn = (pathtrace.render(scene, size, number) for scene, number in zip(host, indices.tolist(), strict=True))
    for picture, (text, known) in zip(drawn, told, strict=True):
        yield picture, text, known
