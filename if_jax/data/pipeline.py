"""Batches for training, where the position is the step.

Batch k is a pure function of (source, seed, k): nothing is saved but the step, and training continues with exactly
the batch it would have seen. Work is split over hosts by rows, so the number of hosts does not change a batch either.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np

from if_jax.data import grammar, scenes

SCENES = "scenes"
BUILD_FILE = "if_jax.json"  # what the builder notes beside the records
_LAST_STEP = 2**40

Tokenize = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]


class Source(Protocol):
    """Captioned pictures by position; a position may lie in any epoch."""

    def read(self, positions: np.ndarray) -> tuple[np.ndarray, list[str], np.ndarray]:
        """Return images (B, S, S, 3) uint8, captions, and the examples' own numbers (B,) int64."""


def batches(
    source: str | Path,
    *,
    size: int,
    batch_size: int,
    seed: int,
    tokenize: Tokenize,
    start_step: int = 0,
    caption_dropout: float = 0.1,
    shard_index: int = 0,
    shard_count: int = 1,
    threads: int = 2,
) -> Iterator[dict[str, np.ndarray]]:
    """Open a source of captioned pictures as an endless iterator of batches.

    Args:
      source: "scenes" (drawn on the fly) or a folder written by `if-jax data build`.
      size: side of the pictures in pixels; stored pictures are scaled down to it, never up.
      batch_size: rows of a whole batch, over all shards.
      seed: decides scenes or shuffling, wording and dropped captions.
      tokenize: captions -> (ids, mask), each int32 (B, L). Dropped captions are "".
      start_step: number of the first batch.
      caption_dropout: share of captions dropped.
      shard_index, shard_count: this host draws rows [i B/n, (i+1) B/n) of every batch.
      threads: batches made ahead at the same time; 0 makes each when asked.

    Returns:
      dicts with image uint8 (B/n, size, size, 3), ids and mask int32 (B/n, L), index int64 (B/n,).

    Raises:
      FileNotFoundError, ValueError: one line naming what is wrong with the source or an argument.
    """
    _check(size, batch_size, seed, start_step, caption_dropout, shard_index, shard_count, threads)
    opened: Source = _Scenes(seed, size) if str(source) == SCENES else _Folder(Path(source), seed, size)
    rows = batch_size // shard_count

    def make(step: int) -> dict[str, np.ndarray]:
        positions = step * batch_size + shard_index * rows + np.arange(rows, dtype=np.int64)
        image, captions, index = opened.read(positions)
        kept = [
            "" if dropped else text
            for text, dropped in zip(captions, _dropped(seed, positions, caption_dropout), strict=True)
        ]
        ids, mask = tokenize(kept)
        return {"image": image, "ids": ids, "mask": mask, "index": index}

    steps = grain.MapDataset.range(start_step, _LAST_STEP).map(make)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)))


def read_build(folder: Path) -> dict[str, Any]:
    """What the builder noted about a built folder; one clear line if it is none."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f'data folder {str(folder)!r} does not exist: write one with `if-jax data build`, or use "{SCENES}"'
        )
    note = folder / BUILD_FILE
    if not note.is_file():
        raise FileNotFoundError(f"{str(folder)!r} is no built data set ({BUILD_FILE} is missing): `if-jax data build`")
    return json.loads(note.read_text())


def open_records(folder: Path) -> Sequence[dict[str, Any]]:
    """The examples of a built folder, images still encoded, captions as bytes."""
    import tensorflow_datasets as tfds  # slow to import, and scenes drawn on the fly need none of it

    builder = tfds.builder_from_directory(str(folder))
    return builder.as_data_source(split="train", decoders={"image": tfds.decode.SkipDecoding()})


class _Scenes:
    """Scene number p at position p; nothing repeats."""

    def __init__(self, seed: int, size: int) -> None:
        self._seed, self._size = seed, size

    def read(self, positions: np.ndarray) -> tuple[np.ndarray, list[str], np.ndarray]:
        batch = scenes.sample_scenes(positions, self._seed)
        pictures = scenes.render_scenes(batch, self._size)  # runs while the captions are written
        captions = [
            grammar.caption(scene, np.random.default_rng((self._seed, int(position))))
            for scene, position in zip(scenes.as_numpy(batch), positions, strict=True)
        ]
        return np.asarray(pictures), captions, positions


class _Folder:
    """A built data set; every epoch is another permutation of its examples."""

    def __init__(self, folder: Path, seed: int, size: int) -> None:
        self._size = size
        note = read_build(folder)
        if note["size"] < size:
            raise ValueError(
                f"{str(folder)!r} holds {note['size']} px pictures, {size} px are asked for: "
                f"build it again with --size {size} or more"
            )
        self._records = open_records(folder)
        self._order = grain.MapDataset.range(len(self._records)).seed(seed).shuffle().repeat(None)

    def read(self, positions: np.ndarray) -> tuple[np.ndarray, list[str], np.ndarray]:
        index = np.asarray([self._order[int(position)] for position in positions], np.int64)
        examples = self._records.__getitems__(index.tolist())
        pictures = np.stack([_decode(example["image"], self._size) for example in examples])
        return pictures, [example["caption"].decode() for example in examples], index


def _decode(encoded: bytes, size: int) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as stored:
        picture = stored.convert("RGB")
        if picture.size != (size, size):
            picture = picture.resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(picture)


def _dropped(seed: int, positions: np.ndarray, share: float) -> list[bool]:
    # Its own stream (the 1), so that another share never changes a caption's wording.
    return [np.random.default_rng((seed, int(position), 1)).random() < share for position in positions]


def _check(
    size: int, batch_size: int, seed: int, start: int, dropout: float, shard: int, shards: int, threads: int
) -> None:
    problems = (
        (size < 8, f"size {size}: pictures need at least 8 px"),
        (batch_size < 1, f"batch_size {batch_size}: give at least 1"),
        (not 0 <= seed < 2**31, f"seed {seed}: give a number from 0 to 2147483647"),
        (start < 0, f"start_step {start}: steps count from 0"),
        (not 0.0 <= dropout <= 1.0, f"caption_dropout {dropout}: give a share from 0 to 1"),
        (not 0 <= shard < shards, f"shard_index {shard} of shard_count {shards}: give 0 <= index < count"),
        (shards > 0 and batch_size % shards != 0, f"batch_size {batch_size} does not divide over {shards} hosts"),
        (threads < 0, f"threads {threads}: give 0 or more"),
    )
    for wrong, message in problems:
        if wrong:
            raise ValueError(message)
