"""Files of records that are complete or not there: array_record shards, and folders that are built in several goes.

Shards in a bucket are read whole, through the cache: array_record's own reader would open them by itself, and hang
without a word where nobody is logged in.
"""

from __future__ import annotations

import bisect
import itertools
import json
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from if_jax.checkpoints.files import atomic_file
from if_jax.data.cache import whole_file
from if_jax.data.remote import RemotePath

PER_SHARD = 1024  # records
_OPEN_SHARDS = 64  # files of one source that stay open


class RemoteShards(Sequence[bytes]):
    """The records of array_record shards in a bucket, numbered through.

    Args:
      paths: of the shards.
      counts: records in each.
    """

    def __init__(self, paths: Sequence[RemotePath], counts: Sequence[int]) -> None:
        self._paths, self._ends = list(paths), list(itertools.accumulate(counts))
        self._readers: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: Any) -> Any:
        """The bytes of record `number`; the whole shard is fetched where it is not in the cache."""
        shard = bisect.bisect_right(self._ends, number)
        return self._reader(shard).read([number - (self._ends[shard - 1] if shard else 0)])[0]

    def _reader(self, shard: int) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader  # pyright: ignore[reportMissingImports]

        with self._lock:
            if shard not in self._readers:
                file = whole_file(self._paths[shard])
                self._readers[shard] = ArrayRecordReader(str(file), options="readahead_buffer_size:0")
                if len(self._readers) > _OPEN_SHARDS:
                    self._readers.popitem(last=False)
            return self._readers[shard]


def write_shard(path: Path, records: Callable[[], Iterable[bytes]], note: Callable[[], dict[str, Any]]) -> dict:
    """Write one shard, then what is noted about it; a noted shard is not made again.

    Args:
      path: of the shard; the note is a hidden file beside it.
      records: makes the records; not called where the shard is complete.
      note: what to note once all records are written.

    Returns:
      The note, and the records' number and bytes.
    """
    from array_record.python.array_record_module import ArrayRecordWriter  # pyright: ignore[reportMissingImports]

    noted = path.with_name(f".{path.name}.json")
    if noted.is_file():
        return json.loads(noted.read_text())
    sizes = []
    with atomic_file(path) as beside:
        writer = ArrayRecordWriter(str(beside), "group_size:1")
        for record in records():
            writer.write(record)
            sizes.append(len(record))
        writer.close()
    content = {"count": len(sizes), "bytes": sum(sizes), **note()}
    with atomic_file(noted) as beside:
        beside.write_text(json.dumps(content))
    return content


def continue_or_clear(partial: Path, spec: dict[str, Any]) -> None:
    """Make a folder to build in, keeping the complete shards of an interrupted build if it was this very one.

    Args:
      partial: the folder.
      spec: everything that decides the bytes, as JSON values.
    """
    note, wanted = partial / ".plan.json", json.dumps(spec, sort_keys=True)
    if not (note.is_file() and note.read_text() == wanted):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        note.write_text(wanted)


def finish(partial: Path, out: Path) -> None:
    """Drop what only a build needs, and rename the folder to `out`, over an earlier one if there is one."""
    for leftover in partial.glob(".*"):
        leftover.unlink()
    aside = out.with_name(f".{out.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    if out.exists():
        out.rename(aside)
    partial.rename(out)
    shutil.rmtree(aside, ignore_errors=True)
