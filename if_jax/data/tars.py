"""Tar files of img2dataset and webdataset, read in place: files of one name are one sample, wherever they stand.

The name ends at the first dot, as in webdataset; at the last one where that finds no picture (`22.05.jpg`).
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from if_jax.data.preprocessing import SUFFIXES, UnusableRecord, read_caption
from if_jax.data.reading import RetryingFile, is_transient, local_copy, read_ranges, retried
from if_jax.data.records import Record, SingleFile
from if_jax.data.remote import DataPath

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_CAPTIONS = ("txt", "text", "caption")
_METADATA = "json"
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")  # key and extension, split at the first dot as webdataset does
_NONE = (0, -1)  # offset and length of a file that is not there
_ENDED = "tar is damaged or ends too early: samples after this are lost"
_LARGEST_TEXT = 2**20  # bytes of a caption or its metadata

Place = Sequence[int]  # offset and length of the picture, the caption and the metadata
Files = dict[str, tuple[int, int]]  # extension -> offset and length


class Tar(SingleFile):
    """One uncompressed tar file."""

    kind = "tar"

    def scan(self) -> Iterator[tuple[str, tuple[int, ...], Record | UnusableRecord]]:
        """Samples in the order of their first files; last, where the file ends too early, what was lost by that."""
        with local_copy(self.path) as file:  # every byte is read: one stream is quicker than a request for each
            samples, ended = _samples(file)
            for key, files in samples:
                place = _place(files)
                yield key, place, _try(file, key, place) if files else UnusableRecord("name without an extension")
            if ended:
                yield "(end of file)", _place({}), UnusableRecord(_ENDED)

    def read(self, key: str, place: Place) -> Record:
        """The sample at `place`; ValueError where it cannot be read any more."""
        record = _try(self.path, key, place)
        if isinstance(record, UnusableRecord):
            raise ValueError(f"{self.name}: sample {key} cannot be read any more ({record})")
        return record

    @staticmethod
    def ranges(place: Place) -> list[tuple[int, int]]:
        """Offset and length of picture, caption and metadata of a sample; length 0 for what is not there."""
        return [(int(place[i]), max(0, int(place[i + 1]))) for i in (0, 2, 4)]

    @staticmethod
    def record(key: str, place: Place, contents: Sequence[bytes]) -> Record | UnusableRecord:
        """The sample at `place`, of what its `ranges` hold."""
        if place[1] < 0:
            return UnusableRecord("no picture")
        picture, text, metadata = contents
        try:
            known = _parse(metadata)
            return Record(key, picture, (_caption(text if place[3] >= 0 else None, known),), known)
        except UnusableRecord as flaw:
            return flaw

    def captions(self, key: str, place: Place) -> tuple[str, ...]:
        """The captions of the sample at `place` alone; ValueError where they cannot be read any more."""
        text, metadata = ((int(place[i]), max(0, int(place[i + 1]))) for i in (2, 4))
        own = place[3] >= 0
        (content,) = read_ranges(self.path, [text if own else metadata])
        try:
            if len(content) < (text if own else metadata)[1]:
                raise UnusableRecord(_ENDED)
            return (_caption(content, {}) if own else _caption(None, _parse(content)),)
        except UnusableRecord as flaw:
            raise ValueError(f"{self.name}: sample {key} cannot be read any more ({flaw})") from None


def _try(path: DataPath, key: str, place: Place) -> Record | UnusableRecord:
    if place[1] < 0:
        return UnusableRecord("no picture")
    return Tar.record(key, place, read_ranges(path, Tar.ranges(place)))


def _samples(path: Path) -> tuple[list[tuple[str, Files]], bool]:
    """Key and files of every sample, and whether the tar ends too early."""
    newest: dict[str, Files] = {}
    samples: list[tuple[str, Files]] = []
    members, ended = _members(path)
    for name, place in members:
        split = _NAME.fullmatch(name)
        if not split:
            samples.append((name, {}))
            continue
        key, extension = split[1], split[2].lower()
        if key not in newest or extension in newest[key]:  # the same file again: another sample of the same key
            newest[key] = {}
            samples.append((key, newest[key]))
        newest[key][extension] = place
    return [part for key, files in samples for part in _split_at_last_dot(key, files)], ended


def _split_at_last_dot(key: str, files: Files) -> list[tuple[str, Files]]:
    """The samples of names that share what stands before their first dot.

    Where that is no picture's name they are told apart at the last dot, and else where a picture has a caption of its
    own: `1.seg.png` beside `1.jpg` and `1.txt` belongs to them, as webdataset has it.
    """
    parts: dict[str, Files] = {"": {}}
    for extension, place in files.items():
        more, _, last = extension.rpartition(".")
        parts.setdefault(more, {})[last] = place
    whole = parts.pop("")
    split = {more: part for more, part in parts.items() if any(map(_is_picture, part))}
    if any(map(_is_picture, whole)):
        split = {more: part for more, part in split.items() if {*_CAPTIONS, _METADATA} & set(part)}
    named = [(f"{key}.{more}", part) for more, part in split.items()]
    return [(key, whole), *named] if whole or not named else named


def _is_picture(extension: str) -> bool:
    return f".{extension}" in SUFFIXES


def _members(path: Path) -> tuple[list[tuple[str, tuple[int, int]]], bool]:
    """Names, offsets and lengths of a tar's files, and whether it ends too early."""
    members: list[tuple[str, tuple[int, int]]] = []
    try:
        size = retried(path.stat, path).st_size
        stream = io.BufferedReader(RetryingFile(path))
        with stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    if member.offset_data + member.size > size:
                        return members, True
                    members.append((member.name, (member.offset_data, member.size)))
            end = tar.offset
        (block,) = read_ranges(path, [(end, tarfile.BLOCKSIZE)])
        return members, block != bytes(tarfile.BLOCKSIZE)  # a block of zeros ends a tar
    except OSError as error:
        if is_transient(error):
            raise
        return members, True
    except (tarfile.TarError, ValueError):
        return members, True


def _place(files: Mapping[str, tuple[int, int]]) -> tuple[int, ...]:
    picture = next((files[name] for name in files if _is_picture(name)), _NONE)
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
