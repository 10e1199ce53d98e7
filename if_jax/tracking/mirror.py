"""A local folder whose files are copied to an object store, which can neither append nor be written by most tools."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from absl import logging
from etils import epath

_EVERY = 60.0  # seconds between copies on the way
_SHARE = 0.02  # of the time, at most


class Mirror:
    """`local`, a folder to write into as into any other, and `push`, which copies what has changed to `remote`."""

    def __init__(self, remote: str) -> None:
        self._remote = epath.Path(remote)
        self._holder = tempfile.TemporaryDirectory(prefix="if_jax_")
        self.local = Path(self._holder.name)
        self._copied: dict[Path, tuple[int, int]] = {}
        self._next = time.monotonic() + _EVERY

    def fetch(self, name: str) -> None:
        """Brings one file here, if it is there."""
        source = self._remote / name
        if source.exists():
            (self.local / name).write_bytes(source.read_bytes())

    def push(self) -> None:
        """Copies the files that have changed; what cannot be copied is said, and tried again the next time."""
        began = time.monotonic()
        for path in sorted(self.local.rglob("*")):
            if not path.is_file() or self._copied.get(path) == (version := _version(path)):
                continue
            target = self._remote / path.relative_to(self.local).as_posix()
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
            except Exception as error:  # as different as object stores are: the run is worth more than its curves
                logging.warning("%s was not written (%s): tried again later", target, " ".join(str(error).split()))
                continue
            self._copied[path] = version
        now = time.monotonic()
        self._next = now + max(_EVERY, (now - began) / _SHARE)

    def push_sometimes(self) -> None:
        """`push`, where the last one is long enough ago."""
        if time.monotonic() > self._next:
            self.push()

    def close(self) -> None:
        """Copies what is left and removes the local folder."""
        self.push()
        self._holder.cleanup()


def _version(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
