"""Files of records that are complete or not there: array_record shards, and folders that are built in several goes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

PER_SHARD = 1024  # records


def write_shard(path: Path, records: Callable[[], Iterable[bytes]], note: Callable[[], dict[str, Any]]) -> dict:
    """Write one shard beside its place and rename it, then what is noted about it; a noted shard is not made again.

    Args:
      records: makes the records; not called where the shard is complete.
      note: what to note once all records are written.

    Returns:
      The note, and the records' number and bytes.
    """
    from array_record.python import array_record_module

    noted = path.with_name(f".{path.name}.json")
    if noted.is_file():
        return json.loads(noted.read_text())
    beside = path.with_name(f".{path.name}.partial")
    writer = array_record_module.ArrayRecordWriter(str(beside), "group_size:1")
    count = used = 0
    for record in records():
        writer.write(record)
        count, used = count + 1, used + len(record)
    writer.close()
    beside.rename(path)
    told = {"count": count, "bytes": used, **note()}
    written = noted.with_suffix(".partial")
    written.write_text(json.dumps(told))
    written.rename(noted)
    return told


def continue_or_clear(partial: Path, plan: dict[str, Any]) -> bool:
    """Prepare a folder to build in, keeping the complete shards of an interrupted build if it was this very one.

    Returns:
      Whether there is something to go on from.
    """
    note, wanted = partial / ".plan.json", json.dumps(plan, sort_keys=True)
    if note.is_file() and note.read_text() == wanted:
        return True
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    note.write_text(wanted)
    return False


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
