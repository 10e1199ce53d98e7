"""Records that are taken out of a source by a list: of keys, addresses of pictures, or hashes of addresses."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from typing import Any

import numpy as np

from if_jax.data.patterns import expand_home
from if_jax.data.reading import as_path, read_file
from if_jax.data.remote import RemoteSettings

REASON = "in data.exclude"
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_URL = re.compile(r"https?://", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, eq=False)
class Exclusions:
    """A list as it was read."""

    keys: frozenset[str]
    urls: np.ndarray  # (N,) uint64, of `hash_url`, sorted

    def matches(self, keys: Any, urls: np.ndarray, label: str) -> np.ndarray:
        """Which records of one store are on the list.

        Args:
          keys: (N,) pyarrow binary, of the records.
          urls: (N,) uint64, of `hash_url`; 0 where the address is not known.
          label: of the store: its records are known as `label/key` as well.

        Returns:
          (N,) bool.
        """
        anywhere, here = self._by_label[""], self._by_label.get(label, frozenset())
        by_key = np.fromiter((key in anywhere or key in here for key in keys.to_pylist()), bool, len(keys))
        if not len(self.urls):
            return by_key
        nearest = np.minimum(np.searchsorted(self.urls, urls), len(self.urls) - 1)
        return by_key | ((self.urls[nearest] == urls) & (urls != 0))

    @functools.cached_property
    def _by_label(self) -> dict[str, frozenset[bytes]]:
        """Keys by the label of the store they may be of; those under "" may be of any."""
        parts: dict[str, set[bytes]] = {"": set()}
        for key in self.keys:
            parts[""].add(key.encode("utf-8", "replace"))
            for slash in (match.start() for match in re.finditer("/", key)):
                parts.setdefault(key[:slash], set()).add(key[slash + 1 :].encode("utf-8", "replace"))
        return {label: frozenset(keys) for label, keys in parts.items()}

    def digest(self) -> str:
        """A hash of what is listed."""
        return hashlib.sha256(repr((sorted(self.keys), self.urls.tolist())).encode("utf-8", "replace")).hexdigest()


def read_exclusions(path: str, settings: RemoteSettings) -> Exclusions | None:
    """Read a list: a line each of a key, an address (https://…), or the SHA-256 of an address; `#` begins a comment.

    Args:
      path: of the file, on a disk or in a bucket; "" for none.
      settings: of the bucket.

    Raises:
      FileNotFoundError, ValueError: it is not there, or no text; one line.
    """
    if not path:
        return None
    file = as_path(expand_home(path), settings)
    if not file.is_file():
        raise FileNotFoundError(f"data.exclude {path!r} is no file: give one of keys or hashes of addresses")
    try:
        lines = [line.strip() for line in read_file(file).decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise ValueError(f"data.exclude {path!r} is no text: give a key or the hash of an address a line") from None
    lines = [line for line in lines if line and not line.startswith("#")]
    urls = [int(line[:16], 16) for line in lines if _SHA256.fullmatch(line)]
    urls += [hash_url(line) for line in lines if _URL.match(line)]
    return Exclusions(frozenset(lines), np.array(sorted(urls), np.uint64))


def hash_url(url: str) -> int:
    """The first 64 bits of the SHA-256 of a picture's address."""
    return int.from_bytes(hashlib.sha256(url.encode("utf-8", "surrogatepass")).digest()[:8], "big")
