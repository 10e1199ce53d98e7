"""A bounded cache on a local disk of what a bucket holds: records by their content, whole files by their version.

What was stored first goes first. A cache that cannot be written or read costs time, never a run.
"""

from __future__ import annotations

import functools
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import logging

from if_jax.checkpoints.files import parse_bytes, user_cache
from if_jax.data.patterns import expand_home
from if_jax.data.reading import read_chunks
from if_jax.data.remote import RemoteError, RemotePath, RemoteSettings

_FETCHING = threading.Lock()  # of whole files: two readers of one shard fetch it once


@functools.lru_cache
def open_cache(settings: RemoteSettings) -> Any | None:
    """The `diskcache.Cache` of these settings; None where they keep nothing, or nothing can be kept.

    Args:
      settings: its folder and size.

    Raises:
      RemoteError: diskcache is not installed.
    """
    size = parse_bytes(settings.cache_size)
    home = user_cache()
    folder = Path(expand_home(settings.cache_folder)) if settings.cache_folder else home and home / "data"
    if not size or folder is None:
        return None
    try:
        import diskcache
    except ImportError:
        raise RemoteError(
            "reading from a bucket needs diskcache, which is not installed: pip install 'if_jax[data]'"
        ) from None
    try:
        return diskcache.Cache(str(folder), timeout=5, disk=_disk_class(), cull_limit=0, size_limit=size)
    except (OSError, sqlite3.Error, diskcache.Timeout) as error:
        logging.warning("%s: no cache can be kept there (%s); all is read from the bucket each time", folder, error)
        return None


def get(settings: RemoteSettings, key: str) -> bytes | None:
    """What is kept under a key."""
    cache = open_cache(settings)
    return None if cache is None else _attempt(cache, lambda: cache.get(key))


def put(settings: RemoteSettings, key: str, content: bytes) -> None:
    """Keep something under a key, if it can be kept."""
    cache = open_cache(settings)
    if cache is not None:
        _attempt(cache, lambda: cache.set(key, content))
        _attempt(cache, lambda: _shrink(cache))


def whole_file(path: RemotePath) -> Path:
    """An object as a file of the cache, fetched if it is not there.

    Raises:
      RemoteError: the cache cannot hold it.
    """
    cache = open_cache(path.settings)
    if cache is None:
        raise RemoteError(
            f"{path} is read as a whole file: give --config.data.remote.cache_size and a folder it fits in"
        )
    key = f"{path}@{path.stat().st_mtime_ns}"
    with _FETCHING:
        file = _kept_file(cache, key)
        if file is None:
            stream = _Stream(read_chunks(path))
            _attempt(cache, lambda: cache.set(key, stream, read=True))
            if stream.error:
                raise stream.error
            _attempt(cache, lambda: _shrink(cache))
            file = _kept_file(cache, key)
    if file is None:
        raise RemoteError(
            f"{path} does not fit in the cache {cache.directory} ({path.settings.cache_size}): set another "
            "--config.data.remote.cache_folder or a larger cache_size"
        )
    return file


def _shrink(cache: Any) -> None:
    """Removes what was stored first until the rest fits; diskcache would remove ten at a time."""
    while cache.volume() > cache.size_limit and (oldest := next(iter(cache), None)) is not None:
        cache.delete(oldest)


def _kept_file(cache: Any, key: str) -> Path | None:
    file = _attempt(cache, lambda: cache.get(key, read=True))
    if file is None:
        return None
    file.close()
    return Path(file.name)


class _Stream:
    """An iterator of bytes, as the file that diskcache takes."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self.error: Exception | None = None  # of the bucket, not of the cache

    def read(self, size: int) -> bytes:
        """The next part, whatever `size` is."""
        try:
            return next(self._chunks, b"")
        except Exception as error:
            self.error = error
            raise OSError("the bucket failed") from error


def _disk_class() -> Any:
    """diskcache's way to disk, without the half of a file that it leaves where a disk is full."""
    import diskcache

    class Disk(diskcache.Disk):
        _last = threading.local()

        def filename(self, *args: Any, **kwargs: Any) -> tuple[str, str]:
            name, self._last.path = super().filename(*args, **kwargs)
            return name, self._last.path

        def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
            if mode == diskcache.core.MODE_PICKLE:  # nothing here is stored so: another user's folder, perhaps
                raise OSError("it holds what if_jax has not stored")
            return super().fetch(mode, filename, value, read)

        def store(self, *args: Any, **kwargs: Any) -> Any:
            self._last.path = None
            try:
                return super().store(*args, **kwargs)
            except OSError:
                if self._last.path:
                    Path(self._last.path).unlink(missing_ok=True)
                raise

    return Disk


def _attempt(cache: Any, use: Callable[[], Any]) -> Any:
    """What using a cache returns; None where that fails: on a full disk, a damaged or a busy one."""
    import diskcache

    try:
        return use()
    except (sqlite3.Error, diskcache.Timeout, OSError) as error:
        logging.log_every_n_seconds(
            logging.WARNING, "cache %s is left out: %s", 600, cache.directory, " ".join(str(error).split())
        )
        return None
