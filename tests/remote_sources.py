"""Sources copied from a disk into the bucket on localhost, and this process led to it."""

from __future__ import annotations

from collections.abc import Iterator
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
