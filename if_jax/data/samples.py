"""Captioned pictures by position: stored records in their shuffled order, drawn scenes, or a mixture of such.

A position lies in some epoch, and what stands there is a function of source and seed alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np
from absl import logging
from PIL import Image

from if_jax.data.index import Filter
from if_jax.data.mixtures import parse_mixture
from if_jax.data.preprocessing import Preparation, fit
from if_jax.data.reading import in_flight
from if_jax.data.records import Record
from if_jax.data.remote import RemoteSettings
from if_jax.data.sources import Stored, UncheckedFlaw, open_stored
from if_jax.scenes import sources
from if_jax.text.captions import prepare_captions

_PART = 2**48  # a mixture numbers the records of its i-th part from i * this
_LAST_POSITION = 2**40
_IN_A_ROW = 64  # pictures that cannot be decoded, after which the data is at fault
_SMALL = 2**12  # records below which Grain takes up to milliseconds to shuffle one number


class Sample(NamedTuple):
    """One captioned picture."""

    image: np.ndarray  # (S, S, 3) uint8
    caption: str
    number: int  # of the record (or scene) within its source
    choice: int  # which of the record's captions it is
    replaced: str = ""  # key of the record in whose place it stands, which cannot be decoded


class Source(Protocol):
    """Captioned pictures by position; a position may lie in any epoch."""

    remote: bool  # whether any of it is read from a bucket

    def read(self, positions: Sequence[int]) -> list[Sample]:
        """Return the samples at these positions."""
        ...

    def fingerprint(self) -> str:
        """What decides the samples besides seed and preparation, in words that show what differs."""
        ...


def open_source(
    source: str,
    size: int,
    seed: int,
    preparation: Preparation,
    keep: Filter,
    settings: RemoteSettings = RemoteSettings(),  # noqa: B008 (frozen)
    exclude: str = "",
) -> Source:
    """Open a source, or a mixture of sources, by position.

    Args:
      source: as `batches` takes it.
      size: side of the pictures in pixels.
      seed: decides scenes or shuffling, cuts and wording.
      preparation: what is done to stored records.
      keep: which stored records are used.
      settings: of buckets.
      exclude: a file that lists stored records which are not used.

    Raises:
      FileNotFoundError, ValueError: one line that says what is wrong with the source.
    """

    def open_part(name: str) -> Source:
        if name in sources.NAMES:
            return _Drawn(name, size, seed)
        stored = open_stored(name, keep.at_least(size), exclude=exclude, settings=settings)
        return StoredPictures(stored, size, seed, preparation)

    parts = parse_mixture(source)
    opened = [open_part(name) for _, name in parts]
    return opened[0] if len(opened) == 1 else _Mixture(opened, [weight for weight, _ in parts])


class StoredPictures:
    """Stored records; every epoch is another permutation of them.

    Args:
      stored: what `open_stored` returns.
      size: side of the pictures in pixels.
      seed: decides order, cuts and captions.
      preparation: what is done to a record.
    """

    def __init__(self, stored: Stored, size: int, seed: int, preparation: Preparation) -> None:
        self.stored, self.remote = stored, stored.remote
        self._size, self._seed, self._preparation = size, seed, preparation
        self._order = _shuffled(len(stored), seed)

    def fingerprint(self) -> str:
        """Number and content of the records that are used, in order."""
        return f"{len(self.stored)} records, {self.stored.fingerprint()[:32]}"

    def read(self, positions: Sequence[int]) -> list[Sample]:
        """The samples at these positions, decoded."""
        ahead = self.stored.read_ahead([self._order(int(position)) for position in positions])
        left = self.stored.remote and len(ahead) < len({*positions})  # those are read many at a time, each by itself
        return list(in_flight(lambda position: self._read(int(position), ahead), positions, left))

    def _read(self, position: int, ahead: Mapping[int, Record]) -> Sample:
        number, record, picture, replaced = self._decode(position, ahead)
        preparation = self._preparation
        shift = preparation.shift * (2.0 * np.random.default_rng((self._seed, position, 2)).random() - 1.0)
        choice = int(np.random.default_rng((self._seed, position, 3)).integers(len(record.captions)))
        (caption,) = prepare_captions([record.captions[choice]], preparation.clean, preparation.preserve_case)
        return Sample(np.asarray(fit(picture, self._size, shift)), caption, number, choice, replaced)

    def _decode(self, position: int, ahead: Mapping[int, Record]) -> tuple[int, Record, Image.Image, str]:
        """The record at a position, or the next in order that can be decoded and the key of the one it stands for."""
        replaced, last = "", None
        for number in map(self._order, range(position, position + _IN_A_ROW)):
            try:
                return number, *self.stored.decode(number, ahead.get(number)), replaced
            except UncheckedFlaw as flaw:
                replaced, last = replaced or self.stored.key(number), flaw
                _warn_once(str(flaw))
        raise ValueError(f"{_IN_A_ROW} pictures in a row cannot be decoded: {last}")


class _Drawn:
    """Scene number p at position p; nothing repeats."""

    remote = False

    def __init__(self, name: str, size: int, seed: int) -> None:
        self._name, self._size, self._seed = name, size, seed

    def fingerprint(self) -> str:
        return f"{self._name}, drawn"

    def read(self, positions: Sequence[int]) -> list[Sample]:
        scenes = sources.draw(self._name, positions, self._seed, self._size)
        rows = zip(positions, scenes, strict=True)
        return [Sample(picture, caption, int(position), 0) for position, (picture, caption, _) in rows]


class _Mixture:
    """Parts in fixed proportion, each walked through in its own order."""

    def __init__(self, parts: Sequence[Source], weights: Sequence[float]) -> None:
        self._parts, self._weights = parts, [weight / sum(weights) for weight in weights]
        self.remote = any(part.remote for part in parts)
        ways = [grain.MapDataset.range(_LAST_POSITION).map(lambda place, i=i: (i, place)) for i in range(len(parts))]
        self._order: Any = grain.MapDataset.mix(ways, self._weights)

    def fingerprint(self) -> str:
        parts = zip(self._weights, self._parts, strict=True)
        return " + ".join(f"{weight:.6g}*({part.fingerprint()})" for weight, part in parts)

    def read(self, positions: Sequence[int]) -> list[Sample]:
        places: list[tuple[int, int]] = [self._order[int(position)] for position in positions]  # part, position in it
        samples: dict[int, Sample] = {}
        for number, part in enumerate(self._parts):
            rows = [row for row, (which, _) in enumerate(places) if which == number]
            for row, sample in zip(rows, part.read([places[row][1] for row in rows]) if rows else [], strict=True):
                samples[row] = sample._replace(number=number * _PART + sample.number)
        return [samples[row] for row in range(len(places))]


@functools.lru_cache(maxsize=1024)
def _warn_once(line: str) -> None:
    logging.warning("%s; the next picture stands in its place", line)


def _shuffled(count: int, seed: int) -> Callable[[int], int]:
    """Position -> record: every epoch another permutation, of which only small ones are kept in memory."""
    if count < _SMALL:
        return lambda position: int(_permutation(count, seed, position // count)[position % count])
    order: Any = grain.MapDataset.range(count).seed(seed).shuffle().repeat(None)
    return lambda position: int(order[position])


@functools.lru_cache(maxsize=16)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch, 4)).permutation(count)
