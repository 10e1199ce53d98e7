"""Records of a bucket, read through the cache and held against the index: they are what was indexed, or refused."""

from __future__ import annotations

import json
from collections.abc import Sequence

from if_jax.data import cache
from if_jax.data.records import Record, RecordStore, hash_content
from if_jax.data.remote import RemoteError, RemoteSettings

_HEAD = 8  # bytes that hold the length of what stands before the picture


def read_cached(store: RecordStore, settings: RemoteSettings, key: str, place: Sequence[int], content: int) -> Record:
    """One record, from the cache where it is there.

    Args:
      store: what it is part of.
      settings: of the cache.
      key: of the record.
      place: of the record in the store.
      content: its hash in the index: what it is kept under, wherever it came from.

    Raises:
      RemoteError: the object holds something else now; or as `store.read`.
    """
    return read_kept(settings, key, content) or keep_checked(store, settings, store.read(key, place), content)


def read_kept(settings: RemoteSettings, key: str, content: int) -> Record | None:
    """A record out of the cache; None where it is not there, or damaged. Arguments as of `read_cached`."""
    kept = _unpack(key, cache.get(settings, f"{content:016x}"))
    if kept is not None and hash_content(kept.picture, kept.captions) == content:
        return kept
    return None


def keep_checked(store: RecordStore, settings: RemoteSettings, record: Record, content: int) -> Record:
    """The record itself, kept in the cache. Arguments as of `read_cached`.

    Raises:
      RemoteError: it is not what was indexed.
    """
    if hash_content(record.picture, record.captions) != content:
        raise RemoteError(
            f"{store.name}: record {record.key} is not what was indexed: the object was written again, or is cut off; "
            "put it back, or index again for a new run"
        )
    if cache.open_cache(settings) is not None:
        cache.put(settings, f"{content:016x}", _pack(record))
    return record


def _pack(record: Record) -> bytes:
    head = json.dumps([record.captions, dict(record.metadata)], default=str).encode()
    return len(head).to_bytes(_HEAD, "little") + head + record.picture


def _unpack(key: str, packed: bytes | None) -> Record | None:
    """A record as it was kept; None for what is damaged."""
    if packed is None:
        return None
    end = _HEAD + int.from_bytes(packed[:_HEAD], "little")
    try:
        captions, metadata = json.loads(packed[_HEAD:end])
        return Record(key, packed[end:], tuple(captions), metadata)
    except (ValueError, TypeError):
        return None
