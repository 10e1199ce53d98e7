"""Pictures inside Parquet files, and the Arrow files that Hugging Face's `save_to_disk` writes, read by pyarrow."""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from if_jax.data.folder_entries import CAPTION_COLUMNS, captions_in
from if_jax.data.preprocessing import UnusableRecord, read_caption
from if_jax.data.reading import RetryingFile, retried
from if_jax.data.records import Record, SingleFile
from if_jax.data.remote import DataPath, RemotePath

_IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "png", "webp", "image_bytes", "bytes")
_ADDRESS_COLUMNS = ("url", "URL", "image_url", "TARGET_URL")
_BUFFER = 2**20  # bytes of an object asked for at least
_KEPT_GROUPS = 4  # row groups of the files of this process that stay decoded


class ArrowFile(SingleFile):
    """One file of rows with a column of encoded pictures and one of captions.

    Args:
      path: of a Parquet file, or of an Arrow stream.

    Raises:
      ValueError: it holds no pictures, no captions, or is no such file; pyarrow is missing.
    """

    kind = "table"

    def __init__(self, path: DataPath) -> None:
        super().__init__(path)
        if isinstance(path, RemotePath) and path.suffix != ".parquet":
            raise ValueError(f"{self.name!r}: Arrow files are mapped from a disk: copy the data set to one")
        schema = read_schema(path)
        image = image_column(schema)
        if image is None:
            addresses = [name for name in schema.names if name in _ADDRESS_COLUMNS]
            raise ValueError(
                f"{self.name!r} holds addresses, not pictures: img2dataset fetches them into tar files"
                if addresses
                else f"{self.name!r} holds no pictures: its columns are {', '.join(schema.names)}"
            )
        if not any(name in CAPTION_COLUMNS for name in schema.names):
            raise ValueError(
                f"{self.name!r} has no captions: its columns are {', '.join(schema.names)}, and captions are looked "
                f"for in {' or '.join(CAPTION_COLUMNS)}"
            )
        self._image, self._time = image, retried(path.stat, path).st_mtime_ns

    def scan(self) -> Iterator[tuple[str, tuple[int, ...], Record | UnusableRecord]]:
        """Every row in order: its number, row group and row in it, and the record or why it is none."""
        numbers = itertools.count()
        for group in range(_group_count(self.path, self._time)):
            for row in range(_read_group(self.path, self._time, group).num_rows):
                key = f"row {next(numbers)}"
                try:
                    yield key, (group, row), self._read(key, group, row)
                except UnusableRecord as flaw:
                    yield key, (group, row), flaw

    def read(self, key: str, place: Sequence[int]) -> Record:
        """The record of a row; ValueError where it cannot be read any more."""
        try:
            return self._read(key, int(place[0]), int(place[1]))
        except (UnusableRecord, IndexError) as flaw:
            raise ValueError(f"{self.name}: {key} cannot be read any more ({flaw})") from None

    def _read(self, key: str, group: int, row: int) -> Record:
        fields = _read_group(self.path, self._time, group).slice(row, 1).to_pylist()[0]
        picture = fields.pop(self._image)
        if isinstance(picture, Mapping):
            if picture.get("bytes") is None and picture.get("path"):
                raise UnusableRecord("picture is not inside: only its path is")
            picture = picture.get("bytes")
        if picture is None:
            raise UnusableRecord("no picture")
        texts = captions_in(fields) or ("",)
        known = {name: value for name, value in fields.items() if isinstance(value, int | float | str)}
        return Record(key, picture, tuple(read_caption(text.encode("utf-8", "replace")) for text in texts), known)


def read_schema(path: DataPath) -> Any:
    """The columns of a Parquet or Arrow file, without its rows.

    Raises:
      ValueError: it is none, or pyarrow is missing.
    """
    arrow = _pyarrow(path)
    try:
        if path.suffix == ".parquet":
            return retried(lambda: arrow.parquet.read_schema(_open(path)), path)
        return retried(lambda: arrow.ipc.open_stream(arrow.memory_map(str(path))).schema, path)
    except arrow.ArrowInvalid:
        raise ValueError(f"{str(path)!r} is damaged, or no {path.suffix[1:]} file: copy it again") from None


def read_rows(path: DataPath) -> list[dict[str, Any]]:
    """All rows of a small Parquet file."""
    arrow = _pyarrow(path)
    try:
        return retried(lambda: arrow.parquet.read_table(_open(path)), path).to_pylist()
    except arrow.ArrowInvalid:
        raise ValueError(f"{str(path)!r} is damaged, or no Parquet file: copy it again") from None


def image_column(schema: Any) -> str | None:
    """The column of a schema that holds encoded pictures: bytes, or Hugging Face's {bytes, path}."""
    import pyarrow

    def is_bytes(kind: Any) -> bool:
        return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)

    def holds_pictures(kind: Any) -> bool:
        if pyarrow.types.is_struct(kind):
            return any(field.name == "bytes" and is_bytes(field.type) for field in kind)
        return is_bytes(kind)

    matches = [field.name for field in schema if holds_pictures(field.type)]
    named = [name for name in _IMAGE_COLUMNS if name in matches]
    structs = [name for name in matches if pyarrow.types.is_struct(schema.field(name).type)]
    return next(iter([*named, *structs]), matches[0] if len(matches) == 1 else None)


def _group_count(path: DataPath, time: int | str) -> int:
    arrow = _pyarrow(path)
    if path.suffix == ".parquet":
        return retried(lambda: arrow.parquet.ParquetFile(_open(path)), path).num_row_groups
    return len(_batches(path, time))


@functools.lru_cache(_KEPT_GROUPS)
def _read_group(path: DataPath, time: int | str, group: int) -> Any:
    arrow = _pyarrow(path)
    if path.suffix == ".parquet":
        return retried(lambda: arrow.parquet.ParquetFile(_open(path)).read_row_group(group), path)
    return _batches(path, time)[group]


@functools.lru_cache(_KEPT_GROUPS)
def _batches(path: DataPath, time: int | str) -> list[Any]:
    """The batches of an Arrow stream: mapped from the disk, not read."""
    arrow = _pyarrow(path)
    return list(arrow.ipc.open_stream(arrow.memory_map(str(path))))


def _open(path: DataPath) -> Any:
    """What pyarrow opens: a path, or an object as a file that is read by ranges."""
    return io.BufferedReader(RetryingFile(path), _BUFFER) if isinstance(path, RemotePath) else path


def _pyarrow(path: DataPath) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{str(path)!r} is read by pyarrow, which is not installed: pip install pyarrow") from None
    return pyarrow
