"""Batches for training, where the position is the step.

Batch k is a pure function of (source, seed, k): nothing is saved but the step, and training continues with exactly
the batch it would have seen. Work is split over hosts by rows, so the number of hosts does not change a batch either,
and every host has as many steps as every other however its records are stored.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from if_jax.data.discovery import find_record_stores
from if_jax.data.embeddings import Embeddings
from if_jax.data.index import Filter
from if_jax.data.mixtures import parse_mixture, stored_parts
from if_jax.data.preprocessing import Preparation
from if_jax.data.reading import in_flight
from if_jax.data.remote import RemotePath, RemoteSettings
from if_jax.data.samples import Sample, Source, StoredPictures, open_source
from if_jax.scenes import sources

_LAST_STEP = 2**40

Tokenize = Callable[[list[str]], Sequence[np.ndarray]]


def batches(
    source: str | Source,
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
    workers: int = 0,
    preparation: Preparation = Preparation(),  # noqa: B008 (frozen)
    keep: Filter = Filter(),  # noqa: B008 (frozen)
    embeddings: str = "",
    encoder: str = "",
    settings: RemoteSettings = RemoteSettings(),  # noqa: B008 (frozen)
    text_names: Sequence[str] = ("ids", "mask"),
    states_shape: tuple[int, int] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Open a source of captioned pictures as an endless iterator of batches.

    Args:
      source: "scenes" or "tasks" (drawn on the fly), what `sources.open_stored` opens, or a weighted mixture of such:
        `0.7*scenes + 0.3*data/mine`. Or what `open_source` has opened.
      size: side of the pictures in pixels; stored pictures are scaled down to it, never up.
      batch_size: rows of a whole batch, over all shards.
      seed: decides scenes or shuffling, cuts, wording and dropped captions.
      tokenize: captions -> (ids, mask), each int32 (B, L), or what `text_names` names. Dropped captions are "".
      start_step: number of the first batch.
      caption_dropout: share of captions dropped.
      shard_index: this host i of n draws rows [i B/n, (i+1) B/n) of every batch.
      shard_count: hosts n.
      threads: batches made ahead at the same time (in each worker), twice as many from a bucket; 0 makes each when
        asked.
      workers: processes that read and decode; 0: this one does.
      preparation: what is done to stored records.
      keep: which stored records are used.
      embeddings: folder of text states that `if-jax embed` wrote for this source.
      encoder: hash of the encoder that wrote them.
      settings: of buckets.
      text_names: of what `tokenize` makes.
      states_shape: (L, D) that kept text states must have.

    Returns:
      dicts with image uint8 (B/n, size, size, 3), ids and mask int32 (B/n, L), index int64 (B/n,); with `embeddings`
      states bfloat16 (B/n, L, D) instead of ids and mask. Where pictures cannot be decoded that were indexed by their
      heads alone, `replaced` names them: the next of the order stand in their places.

    Raises:
      FileNotFoundError, ValueError: one line naming what is wrong with the source or an argument.
    """
    _check(size, batch_size, seed, start_step, caption_dropout, shard_index, shard_count, threads, workers)
    if isinstance(source, str):
        check_workers(source, workers)
        source = open_source(source, size, seed, preparation, keep, settings)
    opened, rows = source, batch_size // shard_count

    if embeddings:
        text = _text_states(opened, Embeddings(embeddings, settings), preparation, encoder, states_shape)
    else:
        text = _text_tokens(tokenize, text_names)

    def make(step: int) -> dict[str, np.ndarray]:
        positions = range(step * batch_size + shard_index * rows, step * batch_size + (shard_index + 1) * rows)
        dropped = _dropped(seed, positions, caption_dropout)
        samples = [
            sample._replace(caption="") if drop else sample
            for sample, drop in zip(opened.read(positions), dropped, strict=True)
        ]
        index = np.asarray([sample.number for sample in samples], np.int64)
        batch = {"image": np.stack([sample.image for sample in samples]), "index": index, **text(samples)}
        replaced = [sample.replaced for sample in samples if sample.replaced]
        return batch | ({"replaced": np.array(replaced)} if replaced else {})

    steps = grain.MapDataset.range(start_step, _LAST_STEP).map(make)
    at_once = 2 * threads if opened.remote else threads  # a bucket's batches wait for it half of the time
    made = steps.to_iter_dataset(grain.ReadOptions(num_threads=at_once, prefetch_buffer_size=2 * threads))
    return iter(_in_workers(made, workers) if workers else made)


def check_workers(source: str, workers: int) -> None:
    """Refuse worker processes where the source, or a part of it, is drawn: ValueError."""
    if workers and any(name in sources.NAMES for _, name in parse_mixture(source)):
        raise ValueError(f"workers {workers} with {source!r}: scenes are drawn by this process, give workers 0")


def describe_files(source: str, settings: RemoteSettings = RemoteSettings()) -> str:  # noqa: B008 (frozen)
    """What is on this host of a source's stored parts, as "3 files, 6f1c…": their names and sizes; cheap.

    Where a part cannot be opened it is the reason instead: hosts that differ in it do not see the same data.
    """
    try:
        files = [
            f for name in stored_parts(source) for store in find_record_stores(name, settings) for f in store.files()
        ]
    except (OSError, ValueError) as error:
        return str(error)
    known = hashlib.sha256(repr(files).encode("utf-8", "surrogateescape")).hexdigest()
    return f"{len(files)} files, {known[:16]}" if files else "drawn"


def _text_tokens(tokenize: Tokenize, names: Sequence[str]) -> Callable[[list[Sample]], dict[str, np.ndarray]]:
    def tokens(samples: list[Sample]) -> dict[str, np.ndarray]:
        return dict(zip(names, tokenize([sample.caption for sample in samples]), strict=True))

    return tokens


def _text_states(
    source: Source, cache: Embeddings, preparation: Preparation, encoder: str, shape: tuple[int, int] | None
) -> Callable[[list[Sample]], dict[str, np.ndarray]]:
    if not isinstance(source, StoredPictures):
        raise ValueError(
            f"embeddings {str(cache.folder)!r} go with one stored source, not with drawn scenes or a mixture"
        )
    cache.check(source.stored, preparation, encoder, shape)
    remote = isinstance(cache.folder, RemotePath)

    def states(samples: list[Sample]) -> dict[str, np.ndarray]:
        rows = in_flight(lambda s: cache.states(s.number, s.choice, s.caption), samples, remote)
        return {"states": np.stack(list(rows))}

    return states


def _in_workers(made: grain.IterDataset, workers: int) -> grain.IterDataset:
    from absl import flags

    if not flags.FLAGS.is_parsed():  # Grain asks flags that only a program started through absl has read
        flags.FLAGS.mark_as_parsed()
    return made.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), worker_init_fn=_leave_interrupts)


def _leave_interrupts(worker: int, workers: int) -> None:
    """Ctrl-C reaches every process of a terminal. The one that trains ends its workers, which need not say more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _dropped(seed: int, positions: Sequence[int], share: float) -> list[bool]:
    # Its own stream (the 1), so that another share never changes a caption's wording.
    return [np.random.default_rng((seed, int(position), 1)).random() < share for position in positions]


def _check(
    size: int,
    batch_size: int,
    seed: int,
    start: int,
    dropout: float,
    shard: int,
    shards: int,
    threads: int,
    workers: int,
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
        (workers < 0, f"workers {workers}: give 0 or more"),
    )
    for wrong, message in problems:
        if wrong:
            raise ValueError(message)
