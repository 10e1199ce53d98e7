"""One stage's share of a request: all its pictures, in programs of equal size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import jax
import numpy as np
from absl import logging

from if_jax.checkpoints.stages import StageRelease
from if_jax.diffusion.samplers import SamplerState
from if_jax.inference.denoise_stage import StepCallback, StepProgress, begin_stage, finish_stage
from if_jax.inference.loading import Placement
from if_jax.inference.options import StageProgress, StepInfo
from if_jax.inference.settings import StageSettings
from if_jax.inference.stage_inputs import StageInputs


@dataclass(frozen=True)
class StageRequest:
    """One stage's share of a request."""

    name: str  # "I", "II", …
    index: int  # of the stage in the cascade
    settings: StageSettings
    inputs: StageInputs  # of all B pictures
    size: tuple[int, int]  # (H, W) of the pictures
    seeds: np.ndarray  # (B,) uint32
    numbers: np.ndarray  # (B,) uint32, of each picture among those of its seed
    batch_size: int  # pictures of one program
    progress: StageProgress | None = None
    callback: Callable[[StepInfo], None] | None = None


def draw_pictures(stage: StageRelease, request: StageRequest, placement: Placement) -> np.ndarray:
    """Draw all pictures of one stage.

    Where they do not fit into memory, half as many are drawn at a time, and half of those.

    Args:
      stage: with its UNet's parameters on the device.
      request: what to draw, of B pictures.
      placement: over which devices they are split, and what to compute in.

    Returns:
      Pictures (B, H, W, 3), float32 in about [-1, 1], not clamped.

    Raises:
      MemoryError: saying what to lower where one picture per device does not fit.
    """
    while True:
        try:
            return _draw(stage, request, placement)
        except jax.errors.JaxRuntimeError as error:
            half = request.batch_size // 2 // placement.ways * placement.ways
            if not _exhausted(error):
                raise
            if not half:
                raise _too_large(request) from error
            logging.warning(
                "stage %s: %s pictures at a time do not fit into memory, drawing %s",
                request.name,
                request.batch_size,
                half,
            )
            request = replace(request, batch_size=half)


def _draw(stage: StageRelease, request: StageRequest, placement: Placement) -> np.ndarray:
    total, drawn = len(request.inputs.text), []
    tiles = list(_tiles(total, request.batch_size))
    for number, rows in enumerate(tiles):
        keys = _picture_keys(request.seeds[rows], np.uint32(request.index), request.numbers[rows])
        state, advance = begin_stage(
            stage,
            request.settings,
            placement.batch(keys),
            request.inputs.select(rows, placement.batch),
            size=request.size,
            dtype=placement.dtype,
        )
        kept = min(request.batch_size, total - number * request.batch_size)
        callback = _step_callback(request, request.numbers[rows[:kept]])
        images = finish_stage(state, advance, _step_progress(request, number, len(tiles)), callback)
        drawn.append(np.asarray(images)[:kept])
    return np.concatenate(drawn)


@jax.jit
def _picture_keys(seeds: jax.Array, stage: jax.Array, numbers: jax.Array) -> jax.Array:
    """One key for each picture (B,), from its seed, the stage and its number alone."""

    def key(seed: jax.Array, number: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), number), stage)

    return jax.vmap(key)(seeds, numbers)


def _tiles(total: int, batch_size: int) -> Iterator[np.ndarray]:
    """Rows of each program, `batch_size` of them always: the last program repeats the last row."""
    for start in range(0, total, batch_size):
        yield np.minimum(np.arange(start, start + batch_size), total - 1)


def _step_progress(request: StageRequest, tile: int, tiles: int) -> StepProgress | None:
    """Progress within one of the programs, as that of the whole stage."""
    progress = request.progress
    if progress is None:
        return None
    return lambda done, total: progress(request.name, tile * total + done, tiles * total)


def _step_callback(request: StageRequest, pictures: np.ndarray) -> StepCallback | None:
    """The user's callback for a program that draws `pictures`, without the rows that fill it up."""
    callback, kept = request.callback, len(pictures)
    if callback is None:
        return None

    def after_step(left: int, state: SamplerState) -> None:
        timestep = request.settings.timesteps[left]
        x, x0 = np.asarray(state.x)[:kept], np.asarray(state.x0)[:kept]
        callback(StepInfo(request.name, pictures, left, timestep, x, x0))

    return after_step


def _exhausted(error: Exception) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


def _too_large(request: StageRequest) -> MemoryError:
    height, width = request.size
    return MemoryError(
        f"out of memory in stage {request.name}, {request.batch_size} picture(s) of {width}x{height} at a time: compute"
        " and keep weights in bfloat16 (dtype, param_dtype), load with low_memory=True, or draw fewer stages"
    )
