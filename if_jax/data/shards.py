"""Files of records that are complete or not there: array_record shards, and folders that are built in several goes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from if_jax.checkpoints.files import atomic_file

PER_SHARD = 1024  # records


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
