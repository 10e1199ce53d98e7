"""A store gone through: every caption read, every picture decoded or its head read, what is wrong noted by reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from if_jax.data.exclusions import hash_url
from if_jax.data.index import Index, changed, read_index, save_index
from if_jax.data.index_part import FACTS, SCORES, Columns, Head, make_columns
from if_jax.data.preprocessing import UnusableRecord, read_picture, read_size
from if_jax.data.records import Record, RecordStore, hash_content, hash_files

_ADDRESSES = ("url", "URL", "image_url", "TARGET_URL")
CHECKS = {"decode": lambda encoded: read_picture(encoded).size, "headers": read_size}  # how a picture is looked at
_LARGEST_SCORE = float(np.finfo(np.float32).max)


def build_index(store: RecordStore, check: str = "decode") -> tuple[Head, Columns]:
    """Go through a store and note what there is. Of records with one key the first sound one stays.

    A store that ends too early or has no captions yields what there is and says so by reason; it raises nothing.

    Args:
      store: what to index.
      check: "decode" every picture, or read "headers" alone: a picture that then cannot be decoded counts as sound.

    Returns:
      Its index, the flawed records included.
    """
    fingerprint, rows, seen = store.fingerprint(), [], set()
    for key, place, record in store.scan():
        try:
            facts, content, url = _facts(record, check)
            if key in seen:
                raise UnusableRecord("duplicate key")
            seen.add(key)
            rows.append((key, place, facts, "", content, url))
        except UnusableRecord as flaw:
            rows.append((key, place, (0, 0, 0, *[np.nan] * len(SCORES)), str(flaw), 0, 0))
    flaws = ("", *sorted({flaw for *_, flaw, _, _ in rows} - {""}))
    number = {flaw: i for i, flaw in enumerate(flaws)}
    columns = make_columns(
        [key.encode("utf-8", "replace") for key, *_ in rows],
        np.array([place for _, place, *_ in rows] or np.zeros((0, 1)), np.int64),
        np.array([(*facts, number[flaw], *hashes) for _, _, facts, flaw, *hashes in rows], FACTS),
    )
    return Head(fingerprint, hash_files(store), len(rows), columns.digest(flaws), flaws, check), columns


def index_store(store: RecordStore, reindex: bool = False, check: str = "decode", beside: bool = False) -> Index:
    """Index a store and keep the index.

    Args:
      store: what to index.
      reindex: take it as it is, whatever an earlier index says.
      check: see `build_index`.
      beside: keep the index beside the store or not at all: whoever uses it is on another machine.

    Raises:
      OSError: `beside`, and it cannot be written there.
      ValueError: an earlier index is of other records, and `reindex` is false; that index is kept.
    """
    kept = None if reindex else read_index(store, quiet=True)
    head, columns = build_index(store, check)
    if kept and kept.head.check == check and not kept.same_records(Index(head, held=columns)):
        raise ValueError(changed(store))
    return save_index(store, head, columns, beside=beside)


def _facts(record: Record | UnusableRecord, check: str) -> tuple[tuple[float, ...], int, int]:
    """The columns of `FACTS` before the flaw, and those behind it: the hashes of content and address."""
    if isinstance(record, UnusableRecord):
        raise record
    size = CHECKS[check](record.picture)
    length = min(len(caption) for caption in record.captions)
    scores = (_score(record.metadata, names) for names in SCORES.values())
    addresses = (record.metadata.get(name) for name in _ADDRESSES)
    address = next((value for value in addresses if isinstance(value, str) and value), "")
    content = hash_content(record.picture, record.captions)
    return (*size, length, *scores), content, hash_url(address) if address else 0


def _score(metadata: Mapping[str, Any], names: Sequence[str]) -> float:
    """The first of these columns that holds a number a float32 can; numbers in words are those of a CSV file."""
    for name in names:
        value = metadata.get(name)
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            try:
                if abs(score := float(value)) < _LARGEST_SCORE:  # not where it is nan
                    return score
            except (ValueError, OverflowError):  # no number, or one of 400 digits
                continue
    return float("nan")
