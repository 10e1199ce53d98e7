"""Reading pictures: which solids stand where, as the net that was trained on renders sees them."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from if_jax.checkpoints.files import atomic_file, sha256_of
from if_jax.evaluation.synth.reader import CELLS, FIELDS, PIXELS, Grid, apply_reader
from if_jax.scenes import geometry, raycast, tasks
from if_jax.scenes.scene import COLOURS, MATERIALS, SHAPES, SIZES, Scene, as_numpy

WEIGHTS = Path(__file__).with_name("reader.safetensors")
NAMES = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "material": MATERIALS}
_MIDDLE = 0.4  # an object is there from this probability on
_SURE = 0.5  # and has an attribute from this one on; else it has none of the names
_BATCH = 32
_SEED = 7_000_003  # of the renders that measure the reader


class DetectedObject(NamedTuple):
    """One object in a picture; an attribute the reader is not sure of is None."""

    shape: str | None
    colour: str | None
    size: str | None
    material: str | None
    right: float  # floor units, as `grammar.Group` has them
    away: float
    at: tuple[float, float]  # column and row as shares of the picture
    score: float  # probability that it is there


def read(pictures: np.ndarray, params: Any | None = None) -> list[list[DetectedObject]]:
    """Detect the objects in pictures.

    Args:
      pictures: (B, 64, 64, 3) in [-1, 1].
      params: the reader's; None: the shipped ones.

    Returns:
      For each picture its objects, left to right.
    """
    grids = _apply_all(pictures, params)
    return [_objects(jax.tree.map(lambda field, i=i: field[i], grids)) for i in range(len(pictures))]


def features(pictures: np.ndarray, params: Any | None = None) -> np.ndarray:
    """The reader's features (B, 104) of pictures (B, S, S, 3) in [-1, 1], S a multiple of 8: for distances."""
    return np.asarray(_apply_all(pictures, params).features)


def to_array(pictures: Sequence[Image.Image], size: int = PIXELS) -> np.ndarray:
    """Pictures as the reader takes them, (B, size, size, 3) in [-1, 1]; larger ones are averaged down."""
    fitted = [p if p.size == (size, size) else p.resize((size, size), Image.Resampling.BOX) for p in pictures]
    return np.stack([np.asarray(picture.convert("RGB"), np.float32) for picture in fitted]) / 127.5 - 1


@functools.cache
def load_weights(path: Path = WEIGHTS) -> Any:
    """The reader's parameters, float32."""
    from safetensors.numpy import load_file

    params: dict[str, Any] = {}
    for name, value in load_file(path).items():
        *parents, last = name.split(".")
        place = functools.reduce(lambda tree, key: tree.setdefault(key, {}), parents, params)
        place[last] = value.astype(np.float32)
    return params


def write_weights(path: Path, params: Any, notes: Mapping[str, Any]) -> None:
    """Write parameters in half precision, with `notes` (JSON values) in the header."""
    from safetensors.numpy import save_file

    flat = {
        ".".join(key.key for key in keys): np.asarray(value, np.float16)
        for keys, value in jax.tree_util.tree_leaves_with_path(params)
    }
    with atomic_file(path) as beside:
        save_file(flat, beside, {"reader": json.dumps(notes)})


def read_notes(path: Path = WEIGHTS) -> dict[str, Any]:
    """The SHA-256 of the weights, and what their header says: how they were trained and how well they read renders."""
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        notes = json.loads(file.metadata()["reader"])
    return {"sha256": sha256_of(path), **notes}


def measure(params: Any | None = None, count: int = 2_048, seed: int = _SEED) -> dict[str, Any]:
    """How well renders of `tasks` are read, a third of them of its held-out split.

    Args:
      params: the reader's; None: the shipped ones.
      count: renders.
      seed: of the scenes.

    Returns:
      Shares of objects found (a detection lies within 0.25 floor units), of their attributes right and of scenes in
      which all is; and how many objects and scenes there were, and how many objects were `invented`.
    """
    totals = dict.fromkeys(("objects", "found", "invented", "scenes", "scene", *FIELDS), 0)
    for start in range(0, count, 64):
        numbers = np.arange(start, min(count, start + 64))
        batch, _ = tasks.sample_tasks(numbers, seed, start // 64 % 3 == 2)
        pictures = np.asarray(raycast.render_scenes(batch, PIXELS), np.float32) / 127.5 - 1
        for scene, objects in zip(as_numpy(batch), read(pictures, params), strict=True):
            for name, value in compare(scene, objects).items():
                totals[name] += value
    parts = {name: totals[name] / totals["objects"] for name in ("found", *FIELDS)}
    known = {"objects": totals["objects"], "scenes": totals["scenes"], "invented": totals["invented"]}
    return known | {
        name: round(value, 5) for name, value in (parts | {"scene": totals["scene"] / totals["scenes"]}).items()
    }


def compare(scene: Scene, objects: Sequence[DetectedObject]) -> dict[str, int]:
    """Count what was read rightly.

    Args:
      scene: what is in the picture, on the host.
      objects: what was read in it.

    Returns:
      objects: of the scene; found: those read within 0.25 floor units; shape, …: those of them whose attribute is
      right; invented: readings of nothing; scenes: 1; scene: 1 where all is right.
    """
    left, right = list(objects), dict.fromkeys(("found", *FIELDS), 0)
    slots = np.flatnonzero(scene.valid)
    exact = len(objects) == len(slots)
    for slot in slots:
        x, y = (float(v) for v in scene.position[slot])
        u, _ = geometry.project(x, y, geometry.middle_height(int(scene.size[slot])))
        gaps = [np.hypot(item.right - u, item.away - y) for item in left]
        if not gaps or min(gaps) > 0.25:
            exact = False
            continue
        nearest = left.pop(int(np.argmin(gaps)))
        right["found"] += 1
        for name in FIELDS:
            same = getattr(nearest, name) == NAMES[name][int(getattr(scene, name)[slot])]
            right[name] += same
            exact &= same
    return right | {"objects": len(slots), "invented": len(left), "scenes": 1, "scene": int(exact)}


def _apply_all(pictures: np.ndarray, params: Any | None) -> Grid:
    """The net on all pictures, in batches of one size, as host arrays."""
    params = load_weights() if params is None else params
    parts = []
    for start in range(0, len(pictures), _BATCH):
        rows = np.minimum(np.arange(start, start + _BATCH), len(pictures) - 1)
        parts.append(jax.tree.map(np.asarray, _apply(params, pictures[rows])))
    return jax.tree.map(lambda *a: np.concatenate(a)[: len(pictures)], *parts)


@jax.jit
def _apply(params: Any, pictures: jax.Array) -> Grid:
    logits = apply_reader(params, jnp.asarray(pictures, jnp.float32))
    chances = {name: jax.nn.softmax(field) for name, field in logits.fields.items()}
    return Grid(jax.nn.sigmoid(logits.middle), logits.offset, chances, logits.features)


def _objects(grid: Grid) -> list[DetectedObject]:
    """The cells of one picture that are likelier to hold a middle than all their neighbours."""
    middle, offset = np.asarray(grid.middle), grid.offset
    padded = np.pad(middle, 1, constant_values=-1.0)
    around = np.max(
        [padded[r : r + CELLS, c : c + CELLS] for r in range(3) for c in range(3) if (r, c) != (1, 1)], axis=0
    )
    objects = []
    for row, column in np.argwhere((middle > _MIDDLE) & (middle > around)).tolist():
        chances = {name: field[row, column] for name, field in grid.fields.items()}
        best = {name: NAMES[name][int(c.argmax())] if c.max() > _SURE else None for name, c in chances.items()}
        at = (column + float(offset[row, column, 0])) / CELLS, (row + float(offset[row, column, 1])) / CELLS
        right, away = geometry.unproject(at, int(chances["size"].argmax()))
        objects.append(DetectedObject(**best, right=right, away=away, at=at, score=float(middle[row, column])))
    return sorted(objects, key=lambda item: item.at)
