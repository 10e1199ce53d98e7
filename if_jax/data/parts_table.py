"""A small table of the parts of an index, so that a source of many opens without a look into each.

It says for every store what its part's head says, and of which file that was read: an entry counts as long as neither
the store nor the file has changed. It is kept beside the rows that pass filters, see `selection`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import logging

from if_jax.checkpoints.files import atomic_file
from if_jax.data.index import Index, index_places, load_index
from if_jax.data.index_part import VERSION, Head
from if_jax.data.reading import file_status, in_flight
from if_jax.data.records import RecordStore
from if_jax.data.remote import RemotePath

_WORTH_KEEPING = 64  # parts
_LOOKED_INTO = 32  # parts at a time


def load_indexes(
    stores: Sequence[RecordStore], folders: Sequence[Path], *, reindex: bool = False
) -> tuple[list[Index | None], bool]:
    """The index of every store, by the table where it is there; None where there is no index that fits.

    Args:
      stores: all of a source.
      folders: where the table may be.
      reindex: see `load_index`.

    Returns:
      The indexes, and whether the table said all there is to know.

    Raises:
      ValueError: a store has changed since it was indexed, and `reindex` is false.
    """
    remote = any(isinstance(store.path, RemotePath) for store in stores)
    table = _read(stores, folders)
    indexes = list(in_flight(lambda store: _known(store, table.get(store.name)), stores, remote))
    if all(indexes):
        return indexes, True
    rest = [store for store, index in zip(stores, indexes, strict=True) if index is None]
    load = functools.partial(load_index, reindex=reindex)
    loaded = iter(list(in_flight(load, rest, remote or len(rest) >= _WORTH_KEEPING, _LOOKED_INTO)))
    return [index or next(loaded) for index in indexes], False


def save_table(stores: Sequence[RecordStore], indexes: Sequence[Index], folders: Sequence[Path]) -> None:
    """Keep the table where it is worth it and not there yet.

    Args:
      stores: all of a source.
      indexes: one for each.
      folders: where it may be kept: in the first that can be written.
    """
    if len(stores) < _WORTH_KEEPING:
        return
    entries = {}
    for store, index in zip(stores, indexes, strict=True):
        if index.file is None:
            return
        entries[store.name] = [index_stamp(store), str(index.file), dataclasses.asdict(index.head)]
    content = json.dumps({"version": VERSION, "parts": entries})
    for folder in folders:
        file = folder / _name(stores)
        try:
            if file.is_file() and file.read_text() == content:
                return
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(file) as beside:
                beside.write_text(content)
            return
        except (OSError, ValueError) as error:
            logging.info("no table of parts in %s: %s", folder, error)  # each part is looked into the next time


def _known(store: RecordStore, entry: Any) -> Index | None:
    """The index of a store as the table has it, if neither has changed since."""
    if entry is None:
        return None
    stamp, file, head = entry
    if head["fingerprint"] != store.fingerprint() or stamp != index_stamp(store):
        return None
    if stamp[0] != file and not Path(file).is_file():  # the copy of a bucket's
        return None
    return Index(Head(**head | {"flaws": tuple(head["flaws"])}), Path(file))


def index_stamp(store: RecordStore) -> list[str]:
    """What changes when a store's index is written again."""
    for place in index_places(store):
        if (status := file_status(place)) is not None:
            return [str(place), str(status.st_size), str(status.st_mtime_ns)]
    return []


def _read(stores: Sequence[RecordStore], folders: Sequence[Path]) -> dict[str, Any]:
    """What the first table says that can be read; nothing where there is none, or one of another version."""
    if len(stores) >= _WORTH_KEEPING:
        for folder in folders:
            try:
                content = json.loads((folder / _name(stores)).read_text())
                if content["version"] == VERSION:
                    return content["parts"]
            except (OSError, ValueError, KeyError, TypeError):
                continue
    return {}


def _name(stores: Sequence[RecordStore]) -> str:
    names = "\n".join(store.name for store in stores)
    return f"parts-{hashlib.sha256(names.encode('utf-8', 'surrogateescape')).hexdigest()[:24]}.json"
