"""Objects in a bucket, or at any address that fsspec opens, with what is used of `pathlib` and one line for each error.

What may pass (429, 503, silence, a lost connection) is tried again here, for minutes, and is an `OSError` with a number
after that. What stays is a `FileNotFoundError`, or a `RemoteError` that says what is missing: a permission, a login.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from absl import logging as absl_logging

from if_jax.data.remote_errors import RemoteError, http_status, missing, translate

Response = TypeVar("Response")

PAUSES = (1.0, 4.0, 15.0, 60.0, 120.0)  # seconds between tries; gcsfs and s3fs make several by themselves in each
SILENCE = 60.0  # seconds without a byte after which a request is given up, and made again
_ADDRESS = re.compile(r"[A-Za-z][\w+.-]+://")
_GAP = 2**16  # bytes between two ranges below which one request is quicker than two
_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs", "abfs": "adlfs", "az": "adlfs"}
_VERSIONS = ("md5Hash", "crc32c", "ETag", "etag", "generation", "mtime", "LastModified", "created")


@dataclasses.dataclass(frozen=True)
class RemoteSettings:
    """What reading from a bucket takes besides the address."""

    cache_folder: str = ""  # on a local disk; "": in the user's cache folder
    cache_size: str = "20GB"  # what is kept there at most, oldest first out; 0B keeps nothing
    requester_pays: str = ""  # project that is billed for reading a requester-pays bucket


class RemoteStatus(NamedTuple):
    """What is used of `os.stat_result`."""

    st_size: int
    st_mtime_ns: str  # changes when the object does: a checksum where the store has one
    st_mode: int


@dataclasses.dataclass(frozen=True)
class RemoteEntry:
    """What is used of `os.DirEntry`."""

    name: str
    path: str
    status: RemoteStatus

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        """Whether it is a folder."""
        return stat.S_ISDIR(self.status.st_mode)

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        """Whether it is an object."""
        return not self.is_dir()


@functools.total_ordering
@dataclasses.dataclass(frozen=True)
class RemotePath:
    """An address in parts, as far as `pathlib.Path` is used on it."""

    address: str  # "gs://bucket/shards/00000.tar", without a slash at its end
    settings: RemoteSettings = dataclasses.field(default=RemoteSettings(), compare=False)

    def __str__(self) -> str:
        return self.address

    def __lt__(self, other: RemotePath) -> bool:
        return self.address.split("/") < other.address.split("/")  # as paths are ordered

    def __truediv__(self, name: str | PurePosixPath) -> RemotePath:
        return dataclasses.replace(self, address=f"{self.address}/{name}".rstrip("/"))

    @property
    def name(self) -> str:
        """The last part."""
        return self.address.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The last part without its suffix."""
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        """The suffix of the last part, with its dot."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        """What it lies in; a bucket lies in itself."""
        above = self.address.rpartition("/")[0]
        return self if above.endswith("/") else dataclasses.replace(self, address=above)

    @property
    def parents(self) -> tuple[RemotePath, ...]:
        """All it lies in, the nearest first."""
        above = self.parent
        return () if above == self else (above, *above.parents)

    def with_name(self, name: str) -> RemotePath:
        """Another object beside this one."""
        return self.parent / name

    def absolute(self) -> RemotePath:
        """Itself."""
        return self

    def stat(self) -> RemoteStatus:
        """Size and version; from the last listing of its folder where there is one."""
        if self.address in _LISTINGS:
            return RemoteStatus(0, "", stat.S_IFDIR)
        listing = _LISTINGS.get(self.parent.address)
        if listing is not None:
            if self.name not in listing:
                raise FileNotFoundError(missing(self.address))
            return listing[self.name].status
        return self.stat_now()

    def stat_now(self) -> RemoteStatus:
        """Size and version, asked anew."""
        return _call(self, lambda files: _status(files.info(self.address)))

    def exists(self) -> bool:
        """Whether an object, or something below a prefix, has this address."""
        return self._mode() != 0

    def is_dir(self) -> bool:
        """Whether something lies below it."""
        return stat.S_ISDIR(self._mode())

    def is_file(self) -> bool:
        """Whether it is an object."""
        return stat.S_ISREG(self._mode())

    def _mode(self) -> int:
        try:
            return self.stat().st_mode
        except FileNotFoundError:
            return 0

    def entries(self) -> list[RemoteEntry]:
        """What lies directly below it, by name; `stat` of these needs no request until `forget_listings`."""
        details = _call(self, lambda files: files.ls(self.address, detail=True))
        own = self.address.partition("://")[2]
        inside = [entry for entry in details if entry["name"].strip("/") != own]  # itself: the mark of an empty folder
        if not inside and any(entry["type"] == "file" for entry in details):
            raise NotADirectoryError(f"{self} is an object, not a folder")
        rows = [RemoteEntry(_name(entry), f"{self}/{_name(entry)}", _status(entry)) for entry in inside]
        _LISTINGS[self.address] = {row.name: row for row in rows}
        return sorted(rows, key=lambda row: row.name)

    def read_range(self, offset: int, length: int) -> bytes:
        """Part of an object; shorter only where the object ends."""
        if length <= 0:
            return b""

        def read(files: Any) -> bytes:
            try:
                return files.cat_file(self.address, start=offset, end=offset + length)
            except Exception as error:
                if http_status(error) == 416:  # it begins behind the object's end
                    return b""
                raise

        return _call(self, read)

    def read_ranges(self, ranges: list[tuple[int, int]]) -> list[bytes]:
        """Parts of an object, each (offset, length); those that lie close together by one request."""
        spans = _spans(ranges)
        return _cut(ranges, {start: self.read_range(start, end - start) for start, end in spans})

    def read_bytes(self) -> bytes:
        """The whole object."""
        return _call(self, lambda files: files.cat_file(self.address))

    def write_bytes(self, content: bytes) -> None:
        """Puts an object, whole or not at all."""
        _call(self, lambda files: files.pipe_file(self.address, content), writes=True)

    def upload(self, file: Path) -> None:
        """Puts a file of this disk as an object, whole or not at all."""
        _call(self, lambda files: files.put_file(str(file), self.address), writes=True)

    def unlink(self) -> None:
        """Removes an object."""
        _call(self, lambda files: files.rm_file(self.address), writes=True)


def read_many(parts: Sequence[tuple[RemotePath, list[tuple[int, int]]]]) -> list[list[bytes] | None]:
    """Parts of many objects in one call, which costs a fraction of a call for each.

    Args:
      parts: objects of one file system, each with its parts as `RemotePath.read_ranges` takes them.

    Returns:
      What that returns, for each object; None where a request failed, and is better made again by itself.
    """
    spans = [_spans(ranges) for _, ranges in parts]
    wanted = [(path.address, start, end) for (path, _), own in zip(parts, spans, strict=True) for start, end in own]
    if not wanted:
        return [_cut(ranges, {}) for _, ranges in parts]
    paths, starts, ends = (list(column) for column in zip(*wanted, strict=True))
    contents = iter(_call(parts[0][0], lambda files: files.cat_ranges(paths, starts, ends, on_error="return")))
    results: list[list[bytes] | None] = []
    for (_, ranges), own in zip(parts, spans, strict=True):
        read = {start: next(contents) for start, _ in own}
        complete = all(isinstance(content, bytes) for content in read.values())
        results.append(_cut(ranges, read) if complete else None)
    return results


DataPath = Path | RemotePath

_OPENING = threading.Lock()  # many readers that begin at a time log in once
_LISTINGS: dict[str, dict[str, RemoteEntry]] = {}  # of folders listed since `forget_listings`


def is_address(name: str) -> bool:
    """Whether a name says how it is reached, as gs://… does; file:// is a path."""
    return bool(_ADDRESS.match(name)) and not name.startswith(("file://", "local://"))


def forget_listings() -> None:
    """From now on every folder is listed anew."""
    _LISTINGS.clear()


@functools.lru_cache
def open_filesystem(scheme: str, requester_pays: str) -> Any:
    """fsspec's file system of a scheme, which keeps no listings of its own.

    Args:
      scheme: "gs", "s3", "memory", …
      requester_pays: the project that is billed; "" for none.

    Raises:
      ImportError, ValueError: its package is missing; there is no such scheme.
    """
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if _PACKAGES.get(scheme) == "gcsfs":
        import aiohttp
        from gcsfs.core import GCSFileSystem  # all by HTTP; what fsspec would open asks by gRPC first, and may hang

        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints a traceback for what is one line here
        options["requests_timeout"] = aiohttp.ClientTimeout(sock_connect=SILENCE, sock_read=SILENCE)
        options["requester_pays"] = requester_pays or False
        if os.environ.get("STORAGE_EMULATOR_HOST"):  # asks for no login, which gcsfs would look for everywhere
            options["token"] = "anon"
        return GCSFileSystem(**options)
    if _PACKAGES.get(scheme) == "s3fs":
        options["requester_pays"] = bool(requester_pays)
    return fsspec.filesystem(scheme, **options)


def _call(path: RemotePath, request: Callable[[Any], Response], *, writes: bool = False) -> Response:
    """What a request to a file system returns, tried again after errors that may pass."""
    scheme = path.address.partition("://")[0]
    try:
        with _OPENING:
            files = open_filesystem(scheme, path.settings.requester_pays)
    except ImportError as error:
        package = _PACKAGES.get(scheme, error.name)
        extra = "'if_jax[data]'" if package == "gcsfs" else package
        raise RemoteError(f"{path}: {scheme}:// needs {package}, which is not installed: pip install {extra}") from None
    except Exception as error:
        if "Protocol not known" not in str(error):
            raise translate(path.address, error, SILENCE, writes) from None
        raise RemoteError(f"{path}: nothing known opens {scheme}://: use gs:// or s3://, or a folder") from None
    for pause in (*PAUSES, None):
        try:
            return request(files)
        except FileNotFoundError:
            raise FileNotFoundError(missing(path.address)) from None
        except Exception as error:  # as different as the libraries of object stores are
            known = translate(path.address, error, SILENCE, writes)
        if not isinstance(known, OSError):
            raise known
        if pause is None:
            message = (
                f"{known.strerror}, also at try {len(PAUSES) + 1}: check the network and the bucket, then start again"
            )
            raise OSError(errno.EIO, message, str(path))
        absl_logging.warning("%s: %s; tried again in %g s", path, known.strerror, pause)
        time.sleep(pause)
    raise AssertionError  # the last try returns or raises


def _spans(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """From where to where is read, in order, to have all ranges (offset, length)."""
    spans: list[tuple[int, int]] = []
    for offset, length in sorted(part for part in ranges if part[1] > 0):
        if spans and offset <= spans[-1][1] + _GAP:
            spans[-1] = spans[-1][0], max(spans[-1][1], offset + length)
        else:
            spans.append((offset, offset + length))
    return spans


def _cut(ranges: Sequence[tuple[int, int]], content: Mapping[int, bytes]) -> list[bytes]:
    """The ranges out of what was read, by where it starts."""
    parts = []
    for offset, length in ranges:
        start = max((start for start in content if start <= offset), default=0)
        parts.append(content[start][offset - start : offset - start + length] if length > 0 else b"")
    return parts


def _name(details: dict[str, Any]) -> str:
    return details["name"].rstrip("/").rpartition("/")[2]


def _status(details: dict[str, Any]) -> RemoteStatus:
    version: Any = next((details[name] for name in _VERSIONS if details.get(name)), "")
    version = str(version.timestamp() if hasattr(version, "timestamp") else version)  # listings and statuses differ
    return RemoteStatus(
        int(details.get("size") or 0), version, stat.S_IFDIR if details["type"] == "directory" else stat.S_IFREG
    )
