"""Batches of a source, read alike by a test and by processes of its own; imports no more than reading takes."""

from __future__ import annotations

import os

import numpy as np

from if_jax.data import pipeline
from if_jax.text.tokens import load_tokenizer

Batch = dict[str, np.ndarray]


def batches(source: str | pipeline.Source, steps: int, start: int = 0, **changes: object) -> list[Batch]:
    """The batches from `start` on: 8 rows of 8 px unless changed."""
    options = {"size": 8, "batch_size": 8, "seed": 5, "tokenize": load_tokenizer("bytes"), "threads": 0}
    made = pipeline.batches(source, start_step=start, **(options | changes))
    return [next(made) for _ in range(steps)]


def batches_by(*arguments: object, **changes: object) -> tuple[int, list[Batch]]:
    """`batches`, and the process that made them."""
    return os.getpid(), batches(*arguments, **changes)
