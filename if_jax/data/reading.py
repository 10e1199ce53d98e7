"""Files and objects read so that an error which may pass is tried again, and never becomes a property of the data.

A network disk or bucket that stumbles once on one host would otherwise drop a record from that host's index for good.
What stays wrong (no such file, no permission, a link to itself) is the data's own and is raised at once.
"""

from __future__ import annotations

import errno
import functools
import io
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from absl import logging

from if_jax.data.remote import DataPath, RemoteEntry, RemoteError, RemotePath, RemoteSettings, RemoteStatus, is_address

Item = TypeVar("Item")
Result = TypeVar("Result")

PAUSES = (0.5, 2.0, 8.0)  # seconds before the second, third and fourth try
IN_FLIGHT = 32  # requests to a bucket at a time, of one reader
_THREAD = threading.local()  # .reads: whether this is a thread of `in_flight`
_CHUNK = 2**23  # bytes of one request where a whole object is read
_LASTING = frozenset(
    (
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EACCES, errno.EPERM),
        *(errno.ENAMETOOLONG, errno.EINVAL, errno.ENXIO, errno.ENODEV, errno.EFBIG),
    )
)


_NAMED = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.ENOTCONN, errno.EREMOTEIO, errno.ENOMEM)


def as_path(name: str, settings: RemoteSettings = RemoteSettings()) -> DataPath:  # noqa: B008 (frozen)
    """A name as a path: of a bucket where it is an address (gs://…), else on a disk."""
    if is_address(name):
        return RemotePath(name.rstrip("/"), settings)
    return Path(name.removeprefix("local://").removeprefix("file://"))


def is_transient(error: Exception) -> bool:
    """Whether a read that failed so may succeed later: an input/output error, a stale handle, a lost connection."""
    return _transient_number(error) is not None


def retried(read: Callable[[], Result], name: str | DataPath) -> Result:
    """What a read returns, tried again after errors that may pass.

    Args:
      read: reads everything anew each time it is called.
      name: what is read, for messages; a `RemotePath` tries again by itself.

    Raises:
      OSError: after the last try, with the number of the error and the name.
      Exception: whatever `read` raises besides, at once.
    """
    if isinstance(name, RemotePath):
        return read()
    for pause in (*PAUSES, None):
        try:
            return read()
        except Exception as error:
            number = _transient_number(error)
            if number is None:
                raise
            if pause is None:
                message = f"{os.strerror(number)}, also at try {len(PAUSES) + 1}: check the disk, then start again"
                raise OSError(number, message, str(name)) from None
            logging.warning("%s: %s; tried again in %g s", name, os.strerror(number), pause)
            time.sleep(pause)
    raise AssertionError  # the last try returns or raises


def _transient_number(error: Exception) -> int | None:
    """The number of an error that may pass; of errors of libraries in C++ it is known by its words alone."""
    if isinstance(error, OSError):
        return None if error.errno in _LASTING else error.errno
    return next((number for number in _NAMED if os.strerror(number) in str(error)), None)


def file_status(path: DataPath) -> os.stat_result | RemoteStatus | None:
    """A file's status; None where there is none, or it may not be asked for."""
    try:
        return retried(path.stat, path)
    except OSError as error:
        if is_transient(error):
            raise
        return None


def read_file(path: DataPath) -> bytes:
    """A whole file's bytes."""
    return retried(path.read_bytes, path)


def read_ranges(path: DataPath, ranges: list[tuple[int, int]]) -> list[bytes]:
    """Parts of a file, each (offset, length); shorter only where the file ends."""
    if isinstance(path, RemotePath):
        return retried(lambda: path.read_ranges(ranges), path)

    def read() -> list[bytes]:
        with open(path, "rb", buffering=0) as file:
            return [_read_range(file.fileno(), offset, length) for offset, length in ranges]

    return retried(read, path)


def list_folder(path: DataPath) -> list[os.DirEntry[str]] | list[RemoteEntry]:
    """What a folder holds, by name."""
    if isinstance(path, RemotePath):
        return retried(path.entries, path)

    def read() -> list[os.DirEntry[str]]:
        with os.scandir(path) as entries:
            return sorted(entries, key=lambda entry: entry.name)

    return retried(read, path)


def in_flight(
    function: Callable[[Item], Result], items: Iterable[Item], remote: bool, count: int = IN_FLIGHT
) -> Iterator[Result]:
    """The results for all items in their order; from a bucket `count` at a time, from a disk one after another."""
    if not remote:
        yield from map(function, items)
        return
    waiting: deque[Future[Result]] = deque()
    # Threads that are kept take half the processor's time of new ones. What such a thread calls has threads of its own:
    # those that are kept may all wait for it.
    own = getattr(_THREAD, "reads", False) or count != IN_FLIGHT
    pool = _new_pool(count) if own else _kept_pool(os.getpid())
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == 2 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        if own:
            pool.shutdown(wait=False)


def _new_pool(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, initializer=lambda: setattr(_THREAD, "reads", True))


@functools.lru_cache(maxsize=1)
def _kept_pool(process: int) -> ThreadPoolExecutor:
    """Of this process: threads are not inherited."""
    return _new_pool(IN_FLIGHT)


def read_chunks(path: DataPath) -> Iterator[bytes]:
    """A whole file in order, in parts of 8 MB that are read side by side.

    Raises:
      RemoteError: it is shorter than its status says, or was written again meanwhile.
    """
    before = retried(path.stat, path)
    size = before.st_size
    starts = range(0, size, _CHUNK)
    lengths = [min(_CHUNK, size - start) for start in starts]
    parts = in_flight(lambda part: read_ranges(path, [part])[0], zip(starts, lengths, strict=True), True)
    for length, content in zip(lengths, parts, strict=True):
        if len(content) < length:
            raise RemoteError(f"{path} is shorter than the {size} bytes it is listed with: copy it there again")
        yield content
    if isinstance(path, RemotePath) and path.stat_now() != before:
        raise RemoteError(f"{path} was written again while it was read: wait until that is done, then start again")


@contextmanager
def local_copy(path: DataPath) -> Iterator[Path]:
    """A file on this disk: itself, or a copy of an object that is removed afterwards."""
    if not isinstance(path, RemotePath):
        yield path
        return
    with tempfile.NamedTemporaryFile(suffix=path.suffix) as file:
        try:
            for chunk in read_chunks(path):
                file.write(chunk)
            file.flush()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise RemoteError(f"{path} does not fit on the disk of {file.name}: set TMPDIR to a larger one") from None
        yield Path(file.name)


class RetryingFile(io.RawIOBase):
    """A file for readers that want one (tarfile), opened anew for every read; wrap it in a buffer."""

    def __init__(self, path: DataPath) -> None:
        self._path, self._offset = path, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves the place of the next read."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._offset}.get(whence)
        self._offset = offset + (retried(self._path.stat, self._path).st_size if base is None else base)
        return self._offset

    def readinto(self, buffer: bytearray | memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Fills a buffer; returns how many bytes there were."""
        (content,) = read_ranges(self._path, [(self._offset, len(buffer))])
        buffer[: len(content)] = content
        self._offset += len(content)
        return len(content)


def _read_range(descriptor: int, offset: int, length: int) -> bytes:
    parts = []
    while length > 0 and (part := os.pread(descriptor, length, offset)):
        parts.append(part)
        offset, length = offset + len(part), length - len(part)
    return b"".join(parts)
