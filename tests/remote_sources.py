"""Sources copied from a disk into the bucket on localhost, and this process led to it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import bucket
import gcsfs.retry
import pytest

from if_jax.data import cache, remote


@contextmanager
def served(folder: Path) -> Iterator[bucket.Bucket]:
    """A bucket that gs:// addresses of this process lead to, with a cache of records in `folder` and no pauses."""

    async def no_pause(seconds: float) -> None:
        pass

    with bucket.serve() as (far, variables), pytest.MonkeyPatch.context() as patch:
        for name, value in (variables | {"XDG_CACHE_HOME": str(folder / "cache")}).items():
            patch.setenv(name, value)
        patch.setattr(gcsfs.retry, "asyncio", SimpleNamespace(sleep=no_pause))
        patch.setattr(remote, "PAUSES", (0.0, 0.0, 0.0))
        forget()
        yield far
        forget()


def forget() -> None:
    """As in another process: connections, listings and the cache are opened anew."""
    remote.open_filesystem.cache_clear()
    remote.forget_listings()
    cache.open_cache.cache_clear()


def upload(far: bucket.Bucket, folder: Path, prefix: str) -> str:
    """Copies the files of a folder but for indexes; returns its address."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "index" not in path.name:
            far.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return f"gs://{bucket.NAME}/{prefix}"


def silent(seconds: float, after: int) -> Callable[[str], float | None]:
    """Trouble of a bucket: from its request `after` on nothing is answered for so long, then all is."""
    count, since = itertools.count(), []

    def trouble(request: str) -> float | None:
        if next(count) < after:
            return None
        since.append(time.monotonic())
        left = since[0] + seconds - time.monotonic()
        return left if left > 0 else None

    return trouble
