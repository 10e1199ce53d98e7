"""Tar files of img2dataset and webdataset, read in place: files of one name (up to the first dot) are one sample."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from if_jax.data.index import Record
from if_jax.data.preprocessing import SUFFIXES, UnusableRecord, read_caption

_CAPTIONS = ("txt", "text", "caption")
_METADATA = "json"
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")  # key and extension, split at the first dot as webdataset does
_NONE = (0, -1)  # offset and length of a file that is not there
_ENDED = "tar is damaged or ends too early: samples after this are lost"
_LARGEST_TEXT = 2**20  # bytes of a caption or its metadata

Place = Sequence[int]  # offset and length of the picture, the caption and the metadata


class Tar:
    """One uncompressed tar file."""

    kind = "tar"

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)

    def fingerprint(self) -> str:
        """Size and time of the file: what says that it was written again."""
        status = self.path.stat()
        return f"{status.st_size} bytes of {status.st_mtime_ns}"

    def files(self) -> list[tuple[str, int]]:
        """Name and size of the file."""
        return [(self.path.name, self.path.stat().st_size)]

    def index_file(self) -> Path:
        """Beside the tar."""
        return self.path.with_name(f"{self.path.name}.index.npz")

    def scan(self) -> Iterator[tuple[str, tuple[int, ...], Record | UnusableRecord]]:
        """Samples in the order they are stored; last, where the file ends too early, what was lost by that."""
        ended: list[UnusableRecord] = []
        for key, files in _samples(self.path, ended):
            place = _place(files)
            yield key, place, self._try(key, place) if files else UnusableRecord("name without an extension")
        for flaw in ended:
            yield "(end of file)", _place({}), flaw

    def read(self, key: str, place: Place) -> Record:
        """The sample at `place`; ValueError where it cannot be read any more."""
        record = self._try(key, place)
        if isinstance(record, UnusableRecord):
            raise ValueError(f"{self.name}: sample {key} cannot be read any more ({record})")
        return record

    def _try(self, key: str, place: Place) -> Record | UnusableRecord:
        if place[1] < 0:
            return UnusableRecord("no picture")
        try:
            with open(self.path, "rb", buffering=0) as file:
                picture, text, metadata = (
                    os.pread(file.fileno(), max(0, int(place[i + 1])), int(place[i])) for i in (0, 2, 4)
                )
            known = _parse(metadata)
            return Record(key, picture, (_caption(text if place[3] >= 0 else None, known),), known)
        except UnusableRecord as flaw:
            return flaw


def find_tars(source: str) -> list[Tar]:
    """The tars of a source: a file, a folder of them, or a pattern as webdataset writes it ({00000..00041}.tar, *.tar).

    Raises:
      FileNotFoundError, ValueError: none is there, or they are compressed.
    """
    path = Path(source)
    if path.is_dir():
        paths = sorted(path.glob("*.tar"))
    else:
        paths = [path for part in _braces(source) for path in (_glob(part) if "*" in part else [Path(part)])]
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        raise FileNotFoundError(f"tar {str(missing[0] if missing else source)!r} does not exist: check the name")
    for tar in paths:
        if tar.name.endswith(("gz", "bz2", "xz", "zst")):
            raise ValueError(f"{tar} is compressed and has no random access: unpack it to a plain .tar")
    return [Tar(path) for path in paths]


def _braces(source: str) -> list[str]:
    span = re.search(r"\{(\d+)\.\.(\d+)\}", source)
    if not span:
        return [source]
    first, last, width = int(span[1]), int(span[2]), len(span[1])
    numbers = (source[: span.start()] + str(i).zfill(width) + source[span.end() :] for i in range(first, last + 1))
    return [name for partly in numbers for name in _braces(partly)]


def _glob(pattern: str) -> list[Path]:
    return sorted(Path(pattern).parent.glob(Path(pattern).name))


def _samples(path: Path, ended: list[UnusableRecord]) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Key and files (extension -> offset, length) of sample after sample; `ended` gets the reason of an early end."""
    size, key, files = path.stat().st_size, "", {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                split = _NAME.fullmatch(member.name)
                if not split:
                    yield member.name, {}
                    continue
                extension = split[2].lower()
                if split[1] != key or extension in files:  # the same file again: the next sample, of the same key
                    if files:
                        yield key, files
                    key, files = split[1], {}
                files[extension] = (member.offset_data, member.size)
            if not _ends_properly(path, tar.offset):
                ended.append(UnusableRecord(_ENDED))
    except (tarfile.TarError, OSError, ValueError):
        ended.append(UnusableRecord(_ENDED))
    if files:
        yield key, files


def _ends_properly(path: Path, offset: int) -> bool:
    """Whether a block of zeros, which ends a tar, follows its last member."""
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _place(files: Mapping[str, tuple[int, int]]) -> tuple[int, ...]:
    picture = next((files[name] for name in files if f".{name}" in SUFFIXES), _NONE)
    caption = next((files[name] for name in _CAPTIONS if name in files), _NONE)
    return (*picture, *caption, *files.get(_METADATA, _NONE))


def _parse(encoded: bytes) -> Mapping[str, Any]:
    try:
        metadata = json.loads(encoded[:_LARGEST_TEXT]) if encoded else {}
    except (ValueError, RecursionError):
        return {}  # the caption may still be there
    return metadata if isinstance(metadata, dict) else {}


def _caption(text: bytes | None, metadata: Mapping[str, Any]) -> str:
    """The caption file's, else the one in the metadata."""
    if text is None:
        written = metadata.get("caption")
        text = written.encode("utf-8", "replace") if isinstance(written, str) else b""
    if len(text) > _LARGEST_TEXT:
        raise UnusableRecord("caption of more than a megabyte")
    return read_caption(text)
