"""What is known of every stored record before training begins: its place, size, caption length, scores, and its flaw.

A store (a tar file, a folder of pictures, a prepared data set) is gone through once; every picture is decoded and every
caption read. What cannot be used stays in the index with its reason. The index is kept in a file beside the store (or
in the user's cache folder where that cannot be written) and belongs to exactly those bytes: a store that has changed
since is refused, because a run that continued on it would see other pictures in another order. Where only the times of
its files differ, as in a copy, it is gone through again and compared record by record.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from if_jax.checkpoints.files import atomic_file, user_cache
from if_jax.data.exclusions import REASON, Exclusions, hash_url
from if_jax.data.preprocessing import UnusableRecord, read_picture
from if_jax.data.reading import is_transient, read_file, retried
from if_jax.data.remote import DataPath, RemotePath

VERSION = 3  # 3: the hash of a picture's address
# Columns of img2dataset's and LAION's metadata, under the names they are found with.
SCORES = {
    "clip": ("similarity", "clip_score", "clip_similarity", "SIMILARITY"),
    "aesthetic": ("aesthetic", "aesthetic_score", "AESTHETIC_SCORE", "prediction"),
    "watermark": ("pwatermark", "watermark", "WATERMARK"),
}
_ADDRESSES = ("url", "URL", "image_url", "TARGET_URL")
FACTS = np.dtype(
    [
        *(("width", "i4"), ("height", "i4"), ("caption", "i4"), *((name, "f4") for name in SCORES)),
        *(("flaw", "u2"), ("content", "u8")),  # content: a hash of the stored picture and its captions
        ("url", "u8"),  # a hash of the address it was fetched from; 0: not known
    ]
)


_LARGEST_SCORE = float(np.finfo(np.float32).max)


class Record(NamedTuple):
    """One stored picture with everything that says what it shows."""

    key: str
    picture: bytes  # as stored, still encoded
    captions: tuple[str, ...]  # one, or several to choose from
    metadata: Mapping[str, Any]


class RecordStore(Protocol):
    """A file or folder of records that is indexed as a whole. `place` is what it needs to find a record again."""

    name: str
    path: DataPath
    kind: str  # of store, in words

    def fingerprint(self) -> str:
        """Changes when the stored bytes may have."""
        ...

    def files(self) -> list[tuple[str, int]]:
        """Names and sizes of what is stored: in these the copies on two hosts must agree, times may differ."""
        ...

    def index_file(self) -> DataPath:
        """Where its index is kept."""
        ...

    def scan(self) -> Iterable[tuple[str, tuple[int, ...], Record | UnusableRecord]]:
        """Everything there, in order: key, place, and the record or why it is none."""
        ...

    def read(self, key: str, place: Sequence[int]) -> Record:
        """One record again."""
        ...


class SingleFile:
    """The half of a `RecordStore` that is the same for every store of one file.

    Args:
      path: of the file.
    """

    def __init__(self, path: DataPath) -> None:
        self.path, self.name = path, str(path)

    def fingerprint(self) -> str:
        """Size and time of the file, or an object's checksum: what says that it was written again."""
        status = retried(self.path.stat, self.path)
        return f"{status.st_size} bytes of {status.st_mtime_ns}"

    def files(self) -> list[tuple[str, int]]:
        """Name and size of the file."""
        return [(self.path.name, retried(self.path.stat, self.path).st_size)]

    def index_file(self) -> DataPath:
        """Beside the file."""
        return self.path.with_name(f"{self.path.name}.index.npz")


@dataclasses.dataclass(frozen=True)
class Filter:
    """Which usable records are trained on; 0 lets all pass, and so does a column that the metadata has not."""

    min_side: int = 0  # pixels; at least the size trained at in any case
    max_aspect: float = 0.0  # longer side over shorter side
    min_caption: int = 0  # characters
    max_caption: int = 0
    min_clip: float = 0.0  # CLIP score of picture and caption ("similarity")
    min_aesthetic: float = 0.0  # aesthetic score
    max_watermark: float = 0.0  # probability of a watermark

    def at_least(self, side: int) -> Filter:
        """The filter of what is trained on at `side` pixels: nothing is scaled up."""
        return dataclasses.replace(self, min_side=max(self.min_side, side))


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
    """The records of one store, the flawed ones included."""

    fingerprint: str
    keys: np.ndarray  # (N,) bytes, UTF-8
    places: np.ndarray  # (N, P) int64
    facts: np.ndarray  # (N,) of FACTS; flaw 0: none, else a number into `flaws`
    flaws: tuple[str, ...]  # "" and the reasons met

    def key(self, row: int) -> str:
        """A record's name."""
        return self.keys[row].decode()

    def same_records(self, other: Index) -> bool:
        """Whether another index is of the same usable records in the same rows."""
        return np.array_equal(self.facts["content"], other.facts["content"])

    def select(
        self, keep: Filter, exclude: Exclusions | None = None, label: str = ""
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Rows (N,) to train on, and those left out by reason; together every row once.

        Args:
          keep: which usable records are used.
          exclude: records that are not.
          label: of the store, as `exclude` may name it.
        """
        reason = np.array(self.flaws, object)[self.facts["flaw"]]
        facts, free = self.facts, self.facts["flaw"] == 0
        if exclude is not None:
            listed = exclude.matches(self.keys, facts["url"], label)
            reason[free & listed] = REASON
            free &= ~listed
        short, long = (pick(facts["width"], facts["height"]) for pick in (np.minimum, np.maximum))
        tests = (
            (keep.min_side, f"smaller than {keep.min_side} px", short < keep.min_side),
            (keep.max_aspect, f"longer than {keep.max_aspect:g} times its width", long > keep.max_aspect * short),
            (keep.min_caption, f"caption shorter than {keep.min_caption}", facts["caption"] < keep.min_caption),
            (keep.max_caption, f"caption longer than {keep.max_caption}", facts["caption"] > keep.max_caption),
            (keep.min_clip, f"CLIP score below {keep.min_clip:g}", facts["clip"] < keep.min_clip),
            (keep.min_aesthetic, f"aesthetic below {keep.min_aesthetic:g}", facts["aesthetic"] < keep.min_aesthetic),
            (keep.max_watermark, f"watermark above {keep.max_watermark:g}", facts["watermark"] > keep.max_watermark),
        )
        for limit, words, fails in tests:
            if limit:
                reason[free & fails] = words
                free &= ~fails
        left_out = {words: np.flatnonzero(reason == words) for words in sorted(set(reason[~free]))}
        return np.flatnonzero(free), left_out


def build_index(store: RecordStore) -> Index:
    """Go through a store, decode every picture, and note what there is. Of records with one key the first sound stays.

    A store that ends too early or has no captions yields what there is and says so by reason; it raises nothing.

    Args:
      store: what to index.

    Returns:
      Its index, the flawed records included.
    """
    fingerprint, rows, seen = store.fingerprint(), [], set()
    for key, place, record in store.scan():
        try:
            facts, content, url = _facts(record)
            if key in seen:
                raise UnusableRecord("duplicate key")
            seen.add(key)
            rows.append((key, place, facts, "", content, url))
        except UnusableRecord as flaw:
            rows.append((key, place, (0, 0, 0, *[np.nan] * len(SCORES)), str(flaw), 0, 0))
    flaws = ("", *sorted({flaw for *_, flaw, _, _ in rows} - {""}))
    number = {flaw: i for i, flaw in enumerate(flaws)}
    return Index(
        fingerprint,
        np.array([key.encode("utf-8", "replace") for key, *_ in rows], bytes),
        np.array([place for _, place, *_ in rows] or np.zeros((0, 1)), np.int64),
        np.array([(*facts, number[flaw], *hashes) for _, _, facts, flaw, *hashes in rows], FACTS),
        flaws,
    )


def load_index(store: RecordStore, *, reindex: bool = False) -> Index | None:
    """The index kept for a store; None where there is none yet, or the times of the store's files are others.

    Args:
      store: whose index it is.
      reindex: take an index that no longer fits for none.

    Raises:
      ValueError: the store has changed since it was indexed, and `reindex` is false.
    """
    kept = _read(store)
    if kept is None:
        return None
    index, files = kept
    if index.fingerprint == store.fingerprint():
        return index
    if files != _hash_files(store) and not reindex:
        raise ValueError(_changed(store))
    return None


def index_store(store: RecordStore, reindex: bool = False) -> Index:
    """Index a store and keep the index.

    Args:
      store: what to index.
      reindex: take it as it is, whatever an earlier index says.

    Raises:
      ValueError: an earlier index is of other records, and `reindex` is false; that index is kept.
    """
    kept, index = None if reindex else _read(store), build_index(store)
    if kept and not kept[0].same_records(index):
        raise ValueError(_changed(store))
    save_index(store, index)
    return index


def save_index(store: RecordStore, index: Index) -> DataPath | None:
    """Keep an index for the next time; returns its file, None where nothing can be written."""
    head = {"version": VERSION, "fingerprint": index.fingerprint, "files": _hash_files(store), "flaws": index.flaws}
    stored = io.BytesIO()
    np.savez(stored, head=np.asarray(json.dumps(head)), keys=index.keys, places=index.places, facts=index.facts)
    for path in _places(store):
        try:
            if isinstance(path, RemotePath):
                path.write_bytes(stored.getvalue())
                return path
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as beside:  # hosts may write at the same time
                beside.write_bytes(stored.getvalue())
            return path
        except (OSError, ValueError):  # a bucket that this account may only read
            continue
    return None


def hash_content(picture: bytes, captions: Iterable[str]) -> int:
    """64 bits that stand for a stored picture and its captions, wherever they are stored."""
    digest = hashlib.blake2b(len(picture).to_bytes(8, "little"), digest_size=8)
    digest.update(picture)
    for caption in captions:
        digest.update(caption.encode("utf-8", "surrogatepass") + b"\0")
    return int.from_bytes(digest.digest(), "little")


def _read(store: RecordStore) -> tuple[Index, str] | None:
    """The index that is kept for a store, whether it still fits or not, and the hash of the files it was made of."""
    place = next((path for path in _places(store) if path.is_file()), None)
    if place is None:
        return None
    try:
        with np.load(io.BytesIO(read_file(place)), allow_pickle=False) as stored:
            head = json.loads(str(stored["head"]))
            if head["version"] != VERSION:
                return None
            flaws = tuple(head["flaws"])
            return Index(head["fingerprint"], stored["keys"], stored["places"], stored["facts"], flaws), head["files"]
    except Exception as error:  # half a file, or not ours: going through the store again is always right
        if is_transient(error):
            raise
        return None


def _hash_files(store: RecordStore) -> str:
    return hashlib.sha256(repr(store.files()).encode("utf-8", "surrogateescape")).hexdigest()


def _changed(store: RecordStore) -> str:
    return (
        f"{store.name} has changed since it was indexed, and would give other pictures in another order: "
        f"`if-jax data inspect {shlex.quote(store.name)} --reindex` indexes it again, for new runs"
    )


def _facts(record: Record | UnusableRecord) -> tuple[tuple[float, ...], int, int]:
    """The columns of `FACTS` before the flaw, and those behind it: the hashes of content and address."""
    if isinstance(record, UnusableRecord):
        raise record
    picture = read_picture(record.picture)
    length = min(len(caption) for caption in record.captions)
    scores = (_score(record.metadata, names) for names in SCORES.values())
    addresses = (record.metadata.get(name) for name in _ADDRESSES)
    address = next((value for value in addresses if isinstance(value, str) and value), "")
    content = hash_content(record.picture, record.captions)
    return (*picture.size, length, *scores), content, hash_url(address) if address else 0


def _score(metadata: Mapping[str, Any], names: Sequence[str]) -> float:
    """The first of these columns that holds a number a float32 can; numbers in words are those of a CSV file."""
    for name in names:
        value = metadata.get(name)
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            try:
                if abs(score := float(value)) < _LARGEST_SCORE:  # not where it is nan
                    return score
            except (ValueError, OverflowError):  # no number, or one of 400 digits
                continue
    return float("nan")


def _places(store: RecordStore) -> tuple[DataPath, ...]:
    beside, cache = store.index_file(), user_cache()
    if cache is None:
        return (beside,)
    known = hashlib.sha256(str(beside.absolute()).encode("utf-8", "surrogateescape")).hexdigest()[:24]
    return beside, cache / "indexes" / f"{known}.npz"
