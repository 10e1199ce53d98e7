"""Data sets prepared by TensorFlow Datasets or built here, opened from their folder without TensorFlow."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from if_jax.data import clevr
from if_jax.data.preprocessing import UnusableRecord, read_caption
from if_jax.data.reading import is_transient, list_folder, read_file, retried
from if_jax.data.records import Record
from if_jax.data.remote import DataPath, RemoteError, RemotePath
from if_jax.data.shards import RemoteShards

INFO = "dataset_info.json"
BUILD_FILE = "if_jax.json"  # what our builders note beside the records
_TEXTS = ("caption", "captions", "text", "title", "description")  # features that say what a picture shows
_NEEDS_TF = ("coco_captions", "clevr", "laion400m")  # builders that read their originals through TensorFlow

Example = dict[str, Any]


class TfdsFolder:
    """One split of a data set that TensorFlow Datasets prepared or that was built here, stored as array_record."""

    kind = "prepared"

    def __init__(self, path: DataPath, split: str = "train") -> None:
        import tensorflow_datasets as tfds  # slow to import, and scenes drawn on the fly need none of it

        self.path, self.split, self.name = path, split, str(path) + (f"@{split}" if split != "train" else "")
        builder = _builder(path)
        if split not in builder.info.splits:
            raise ValueError(f"{str(path)!r} has no split {split!r}: it has {', '.join(sorted(builder.info.splits))}")
        stored = builder.info.file_format
        if stored is None or stored.value != "array_record":
            raise ValueError(
                f"{str(path)!r} is stored as {stored and stored.value}, which has no random access without TensorFlow: "
                "prepare it with file_format=array_record"
            )
        features = cast(Mapping[str, Any], builder.info.features)
        self._image, self._captions = _image_feature(features, path), _caption_reader(features, path)
        decoders = {self._image: tfds.decode.SkipDecoding()}
        if isinstance(path, RemotePath):
            info = builder.info.splits[split]
            shards = RemoteShards([path / name for name in sorted(info.filenames)], info.shard_lengths)
            self._records: Sequence[Example] = _Decoded(shards, builder.info.features, decoders)
        else:
            self._records = builder.as_data_source(split=split, decoders=decoders)  # pyright: ignore

    def __len__(self) -> int:
        return len(self._records)

    def __getstate__(self) -> tuple[DataPath, str]:
        return self.path, self.split

    def __setstate__(self, state: tuple[DataPath, str]) -> None:
        self.__init__(*state)

    def fingerprint(self) -> str:
        """A hash of the description, and every file's size."""
        known = hashlib.sha256(read_file(self.path / INFO))
        known.update(repr(self.files()).encode())
        return known.hexdigest()

    def files(self) -> list[tuple[str, int]]:
        """Names and sizes of the shards of every split."""
        shards = sorted(entry.name for entry in list_folder(self.path) if "array_record" in entry.name)
        return [(name, retried((self.path / name).stat, self.path / name).st_size) for name in shards]

    def index_file(self) -> DataPath:
        """Within the folder."""
        return self.path / f".{self.split}.index"

    def scan(self) -> Iterator[tuple[str, tuple[int, ...], Record | UnusableRecord]]:
        """Every record in order: key, row, and the record or why it is none."""
        for row in range(len(self)):
            key = f"{self.split}/{row}"
            try:
                yield key, (row,), self.read(key, (row,))
            except UnusableRecord as flaw:
                yield key, (row,), flaw

    def read(self, key: str, place: Sequence[int]) -> Record:
        """The record of a row.

        Raises:
          UnusableRecord: its bytes are damaged, or it has no caption.
        """
        try:
            example = retried(lambda: self._records[int(place[0])], self.name)
        except (RemoteError, FileNotFoundError):  # of the bucket, or of the cache on the way
            raise
        except Exception as error:  # whatever the reader stumbles over in damaged bytes
            if is_transient(error):
                raise
            raise UnusableRecord("unreadable record") from None
        texts = [text.encode() if isinstance(text, str) else text for text in self._captions(example)]
        if not texts:
            raise UnusableRecord("no caption")
        return Record(key, example[self._image], tuple(map(read_caption, texts)), _metadata(example))


class _Decoded(Sequence[Example]):
    """Records of shards in a bucket as examples: what `as_data_source` is for shards on a disk."""

    def __init__(self, records: Sequence[bytes], features: Any, decoders: Mapping[str, Any]) -> None:
        self._records, self._features, self._decoders = records, features, decoders

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number: Any) -> Any:
        return self._features.deserialize_example_np(self._records[number], decoders=self._decoders)


def find_tfds_folder(source: str | DataPath) -> DataPath | None:
    """The folder of a prepared data set, the newest version of several; None where `source` is none.

    Args:
      source: the folder, one that holds versions of it, or a name that TensorFlow Datasets knows.

    Raises:
      FileNotFoundError: a known name that is not prepared; says how to prepare it.
    """
    path = Path(source) if isinstance(source, str) else source
    if isinstance(path, RemotePath) or path.is_dir():
        if (path / INFO).is_file():
            return path
        folders = (path / entry.name for entry in list_folder(path) if not entry.is_file(follow_symlinks=False))
        return max((folder for folder in folders if (folder / INFO).is_file()), default=None)  # pyright: ignore
    return (
        _by_name(source)
        if isinstance(source, str) and source.replace("_", "").replace("/", "").replace(":", "").isalnum()
        else None
    )


def read_note(path: DataPath) -> dict[str, Any]:
    """What our builder noted about a built folder; empty for others' data sets."""
    file = path / BUILD_FILE
    return json.loads(read_file(file)) if file.is_file() else {}


def _builder(path: DataPath) -> Any:
    """TFDS's builder of a folder; of one in a bucket it is made of a copy of the files that describe it."""
    import tensorflow_datasets as tfds

    if not isinstance(path, RemotePath):
        return tfds.builder_from_directory(str(path))
    with tempfile.TemporaryDirectory() as copy:
        for entry in list_folder(path):
            if not entry.is_dir() and entry.name.endswith((".json", ".txt")):
                (Path(copy) / entry.name).write_bytes(read_file(path / entry.name))
        return tfds.builder_from_directory(copy)


def _by_name(name: str) -> Path | None:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import constants

    known = name.split("/")[0].split(":")[0]
    if known not in tfds.list_builders(with_community_datasets=False):
        return None
    root = Path(constants.DATA_DIR)
    versions = sorted(file.parent for file in root.glob(f"{known}/**/{INFO}"))
    if versions:
        return versions[-1]
    needs = " (needs TensorFlow: pip install 'if_jax[tf]')" if known in _NEEDS_TF else ""
    raise FileNotFoundError(
        f"data set {name!r} is not prepared below {root}: `tfds build {known} --file_format=array_record`{needs}, "
        "or give the folder it was prepared in"
    )


def _image_feature(features: Mapping[str, Any], path: DataPath) -> str:
    import tensorflow_datasets as tfds

    for name, feature in features.items():
        if isinstance(feature, tfds.features.Image):
            return name
    raise ValueError(f"{str(path)!r} holds no pictures: its features are {', '.join(sorted(features))}")


def _caption_reader(features: Mapping[str, Any], path: DataPath) -> Callable[[Example], tuple[str | bytes, ...]]:
    """Picks the captions out of an example of these features."""
    import tensorflow_datasets as tfds

    for name in _TEXTS:
        if name not in features:
            continue
        if isinstance(features[name], tfds.features.Text):
            return lambda example: (example[name],)
        if isinstance(features[name], tfds.features.Sequence):
            return lambda example: _texts(example[name])
    if "objects" in features and set(clevr.FIELDS) <= set(getattr(features["objects"], "feature", features["objects"])):
        names = {
            field: tuple(features["objects"][field].names)
            for field in ("color", "material", "shape", "size")
            if getattr(features["objects"][field], "names", None)
        }
        return lambda example: clevr.captions(example["objects"], names)
    raise ValueError(f"{str(path)!r} has no captions: its features are {', '.join(sorted(features))}")


def _metadata(example: Example) -> dict[str, Any]:
    """What was known of a picture before it was built into a data set here."""
    try:
        known = json.loads(example.get("metadata", "{}"))
    except (ValueError, TypeError):  # someone else's feature of that name
        return {}
    return known if isinstance(known, dict) else {}


def _texts(value: Any) -> tuple[str | bytes, ...]:
    """Several captions of one picture, as plain texts or as coco_captions' {"text": …}."""
    return tuple(value["text"] if isinstance(value, dict) else value)
