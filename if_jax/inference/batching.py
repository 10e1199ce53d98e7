"""One stage's share of a request: all its pictures, in programs of equal size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from absl import logging

from if_jax.checkpoints.stages import StageRelease
from if_jax.inference.denoise_stage import draw_stage
from if_jax.inference.loading import Placement
from if_jax.inference.options import Progress, StepInfo
from if_jax.inference.settings import StageSettings


@dataclass(frozen=True)
class StageRequest:
    """One stage's share of a request."""

    name: str
    index: int
    settings: StageSettings
    size: tuple[int, int]
    seed: int
    first_picture: int
    batch_size: int


def draw_pictures(
    stage: StageRelease,
    job: StageRequest,
    placement: Placement,
    arrays: Mapping[str, Any],
    progress: Progress | None = None,
    callback: Callable[[StepInfo], None] | None = None,
) -> np.ndarray:
    """All pictures of one stage (B, H, W, 3). arrays: what `draw_stage` takes of B pictures, by its words.

    Where they do not fit into memory, half as many are drawn at a time, and half of those.
    Raises MemoryError saying what to lower where one picture per device does not fit.
    """
    while True:
        try:
            return _draw(stage, job, placement, arrays, progress, callback)
        except jax.errors.JaxRuntimeError as error:
            half = job.batch_size // 2 // placement.ways * placement.ways
            if not _exhausted(error):
                raise
            if not half:
                raise _too_large(job) from error
            logging.warning(
                "stage %s: %s pictures at a time do not fit into memory, drawing %s", job.name, job.batch_size, half
            )
            job = replace(job, batch_size=half)


def _draw(
    stage: StageRelease,
    job: StageRequest,
    placement: Placement,
    arrays: Mapping[str, Any],
    progress: Progress | None,
    callback: Callable[[StepInfo], None] | None,
) -> np.ndarray:
    total, drawn = len(arrays["text"]), []
    tiles = list(_tiles(total, job.batch_size))
    for number, rows in enumerate(tiles):
        part = {word: None if value is None else value[rows] for word, value in arrays.items()}
        noise, place = part.pop("noise"), placement.batch
        keys = _picture_keys(np.uint32(job.seed), np.uint32(job.index), np.asarray(rows + job.first_picture, np.uint32))
        kept = min(job.batch_size, total - number * job.batch_size)
        images = draw_stage(
            stage,
            job.settings,
            place(keys),
            **{word: place(value) for word, value in part.items()},
            noise=noise,
            dtype=placement.dtype,
            size=job.size,
            progress=_step_progress(progress, job.name, number, len(tiles)),
            callback=_step_callback(callback, job.name, rows[:kept] + job.first_picture),
        )
        drawn.append(np.asarray(images)[:kept])
    return np.concatenate(drawn)


@jax.jit
def _picture_keys(seed: jax.Array, stage: jax.Array, rows: jax.Array) -> jax.Array:
    """One key for each picture (B,), from the seed, the stage and the picture's number alone."""
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), stage))(rows)


def _tiles(total: int, batch_size: int) -> Iterator[np.ndarray]:
    """Rows of each program, `batch_size` of them always: the last program repeats the last row."""
    for start in range(0, total, batch_size):
        yield np.minimum(np.arange(start, start + batch_size), total - 1)


def _step_progress(progress: Progress | None, name: str, tile: int, tiles: int) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(name, tile * total + done, tiles * total)


def _step_callback(callback: Callable[[StepInfo], None] | None, name: str, pictures: np.ndarray) -> Any:
    if callback is None:
        return None
    kept = len(pictures)

    def tell(left: int, timestep: int, x: np.ndarray, x0: np.ndarray) -> None:
        callback(StepInfo(name, pictures, left, timestep, x[:kept], x0[:kept]))

    return tell


def _exhausted(error: Exception) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


def _too_large(job: StageRequest) -> MemoryError:
    height, width = job.size
    return MemoryError(
        f"out of memory in stage {job.name}, {job.batch_size} picture(s) of {width}x{height} at a time: compute and"
        " keep weights in bfloat16 (dtype, param_dtype), load with low_memory=True, or draw fewer stages"
    )
