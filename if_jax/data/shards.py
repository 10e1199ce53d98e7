"""Files of records that are complete or not there: array_record shards, and folders that are built in several goes.

Shards in a bucket are read whole, through the cache: array_record's own reader would open them by itself, and hang
without a word where nobody is logged in.
"""

from __future__ import annotations

import bisect
import itertools
import json
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from if_jax.checkpoints.files import atomic_file
from if_jax.data.cache import whole_file
from if_jax.data.reading import read_file
from if_jax.data.remote import DataPath, RemotePath

PER_SHARD = 1024  # records
_OPEN_SHARDS = 64  # files of one source that stay open


class ShardReaders:
    """Array_record shards, each opened when it is first read; those that were not read for longest are closed.

    Args:
      paths: of the shards. What lies in a bucket is fetched whole where it is not in the cache.
    """

    def __init__(self, paths: Sequence[DataPath]) -> None:
        self._paths = list(paths)
        self._readers: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, shard: int, row: int) -> bytes:
        """The bytes of a shard's record; rows below 0 count from its end."""
        reader = self._reader(shard)
        return reader.read([row if row >= 0 else reader.num_records() + row])[0]

    def _reader(self, shard: int) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader  # pyright: ignore[reportMissingImports]

        with self._lock:
            if shard in self._readers:
                self._readers.move_to_end(shard)
            else:
                path = self._paths[shard]
                file = whole_file(path) if isinstance(path, RemotePath) else path
                self._readers[shard] = ArrayRecordReader(str(file), options="readahead_buffer_size:0")
                if len(self._readers) > _OPEN_SHARDS:
                    self._readers.popitem(last=False)
            return self._readers[shard]


class RemoteShards(Sequence[bytes]):
    """The records of array_record shards in a bucket, numbered through.

    Args:
      paths: of the shards.
      counts: records in each.
    """

    def __init__(self, paths: Sequence[RemotePath], counts: Sequence[int]) -> None:
        self._readers, self._ends = ShardReaders(paths), list(itertools.accumulate(counts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: Any) -> Any:
        """The bytes of record `number`."""
        shard = bisect.bisect_right(self._ends, number)
        return self._readers.read(shard, number - (self._ends[shard - 1] if shard else 0))


def write_shard(path: DataPath, records: Callable[[], Iterable[bytes]], note: Callable[[Path], dict[str, Any]]) -> dict:
    """Write one shard, then what is noted about it; a noted shard is not made again.

    Args:
      path: of the shard, on a disk or in a bucket; the note is a hidden file beside it.
      records: makes the records; not called where the shard is complete.
      note: what to note, of the shard as a file on this disk.

    Returns:
      The note, and the records' number and bytes.
    """
    noted = note_of(path)
    if noted.is_file():
        return json.loads(read_file(noted))
    if isinstance(path, RemotePath):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / path.name
            content = {**_write(file, records()), **note(file)}
            path.upload(file)
        noted.write_bytes(json.dumps(content).encode())
        return content
    with atomic_file(path) as beside:
        content = _write(beside, records())
    content |= note(path)
    with atomic_file(path.with_name(noted.name)) as beside:
        beside.write_text(json.dumps(content))
    return content


def note_of(path: DataPath) -> DataPath:
    """Where the note about a shard stands once the shard is complete."""
    return path.with_name(f".{path.name}.json")


def _write(file: Path, records: Iterable[bytes]) -> dict[str, Any]:
    from array_record.python.array_record_module import ArrayRecordWriter  # pyright: ignore[reportMissingImports]

    sizes = []
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for record in records:
        writer.write(record)
        sizes.append(len(record))
    writer.close()
    return {"count": len(sizes), "bytes": sum(sizes)}


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
    """Rename the folder to `out`, over an earlier one if there is one, and drop what only a build needs."""
    aside = out.with_name(f".{out.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    if out.exists():
        out.rename(aside)
    partial.rename(out)  # before the notes go: a build that is killed here is complete, or goes on
    for leftover in out.glob(".*"):
        leftover.unlink()
    shutil.rmtree(aside, ignore_errors=True)
