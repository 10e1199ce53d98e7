"""Data sets written to disk: drawn scenes, emoji, or any source cut square and scaled, as array_record shards.

The folder is one of TensorFlow Datasets' (`tfds.builder_from_directory` opens it), written and read without TensorFlow.
Shards are written side by side in processes, each beside its place and renamed when complete, and the whole folder
likewise: a build that was killed goes on from its complete shards, and ends with the same bytes as one that was not.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from if_jax.data import emoji
from if_jax.data.index import Filter, save_index
from if_jax.data.index_part import FACTS, Head, make_columns
from if_jax.data.index_part import VERSION as INDEX_VERSION
from if_jax.data.patterns import expand_home
from if_jax.data.preprocessing import fit, read_caption, read_picture
from if_jax.data.records import hash_content, hash_files
from if_jax.data.selection import Skipped
from if_jax.data.shards import PER_SHARD, continue_or_clear, finish, write_shard
from if_jax.data.sources import cores, in_processes, open_stored, summarise_skipped
from if_jax.data.tfds_folder import BUILD_FILE, INFO, TfdsFolder
from if_jax.scenes import tasks
from if_jax.scenes.pathtrace import check_mitsuba
from if_jax.scenes.sources import RENDERERS, draw

NAMES = ("scenes", "tasks", "emoji", "folder")
_CHUNK_PIXELS = 2**18  # pictures drawn at a time hold about this many pixels
_PER_SLOW_SHARD = 16  # path-traced pictures take seconds each: what an interrupted build may lose
_VERSION = "1.1.0"

Row = dict[str, Any]  # a record before it is encoded


@dataclasses.dataclass(frozen=True)
class BuildReport:
    """What a build wrote; prints as what the user wants to know."""

    path: Path
    kind: str
    count: int
    size: int
    seed: int | None
    skipped: dict[str, list[str]]  # reason -> records left out for it
    renderer: str | None = None  # of what is drawn here

    def __str__(self) -> str:
        renderer = " (mitsuba)" if self.renderer == "mitsuba" else ""
        first = f"wrote {self.count} pictures of {self.size} px to {self.path}{renderer}"
        skipped = {reason: Skipped.summary(names) for reason, names in self.skipped.items()}
        return "\n".join([first, *summarise_skipped(skipped)])


@dataclasses.dataclass(frozen=True)
class _BuildSpec:
    """Everything that decides a data set's bytes."""

    kind: str
    source: str  # of "folder" and "emoji"
    fingerprint: str  # of the source
    counts: dict[str, int]  # pictures by split
    size: int
    seed: int
    renderer: str | None = None  # of "scenes" and "tasks"
    per_shard: int = dataclasses.field(default_factory=lambda: PER_SHARD)
    version: str = _VERSION
    index_version: int = INDEX_VERSION  # what is noted beside each shard


@dataclasses.dataclass(frozen=True)
class _Shard:
    """One file to write: pictures first … last - 1 of a split."""

    spec: _BuildSpec
    split: str
    number: int
    of: int
    folder: Path

    @property
    def span(self) -> range:
        """Numbers of its pictures within the split."""
        first = self.number * self.spec.per_shard
        return range(first, min(first + self.spec.per_shard, self.spec.counts[self.split]))

    @property
    def path(self) -> Path:
        """Its file."""
        return self.folder / f"{self.spec.kind}-{self.split}.array_record-{self.number:05d}-of-{self.of:05d}"


def build(
    name: str,
    out: str | Path,
    *,
    source: str | Path | None = None,
    count: int = 10_000,
    size: int = 256,
    seed: int = 0,
    overwrite: bool = False,
    workers: int | None = None,
    renderer: str = RENDERERS[0],
) -> BuildReport:
    """Write a data set to the folder `out`; the same call after an interruption goes on where it ended.

    Args:
      name: "scenes" or "tasks" (drawn here), "emoji" (Fluent 3D emoji, fetched by npm) or "folder" (any `source`).
      out: becomes a folder that `pipeline.batches`, `inspect` and `tfds.builder_from_directory` open.
      source: folder: anything `sources.open_stored` opens; emoji: folder with the two packages, if not to be fetched.
      count: scenes of the training split.
      seed: of the scenes.
      size: side of the stored pictures in pixels.
      overwrite: replace an earlier data set at `out`.
      workers: processes; None: one per core. On an accelerator scenes are drawn by this one, and by Mitsuba always,
        which has threads of its own.
      renderer: scenes, tasks: "raycast", or "mitsuba" for the same scenes in another look, seconds a picture.

    Returns:
      What was written, and what was left out.

    Raises:
      FileExistsError, FileNotFoundError, ValueError: one line; nothing is left half-written.
      OSError: the disk is full, say; complete shards are kept for the next call.
    """
    out = Path(expand_home(str(out)))
    _check(name, out, source, count, size, seed, overwrite)
    _check_renderer(name, renderer)
    spec, skipped = _make_spec(name, source, count, size, seed, renderer)
    partial = out.parent / f".{out.name}.partial"
    continue_or_clear(partial, dataclasses.asdict(spec))
    written = _write_shards(spec, partial, _processes(spec, workers))
    drawn_with = None if name in ("folder", "emoji") else seed
    report = BuildReport(out, name, sum(spec.counts.values()), size, drawn_with, skipped, spec.renderer)
    _describe(spec, partial, written, report)
    finish(partial, out)
    for split, examples in written.items():
        _save_facts(out, split, examples, size)
    return report


def _make_spec(
    name: str, source: str | Path | None, count: int, size: int, seed: int, renderer: str
) -> tuple[_BuildSpec, dict[str, list[str]]]:
    if name == "folder":
        stored = open_stored(str(source), Filter(min_side=size), reindex=True)
        return _BuildSpec(name, str(source), stored.fingerprint(), {"train": len(stored)}, size, 0), stored.left_out
    if name == "emoji":
        emojis = emoji.open_emoji(source)
        counts = {split: len(rows) for split, rows in emojis.splits.items() if rows}
        return _BuildSpec(name, str(emojis.folder), emojis.fingerprint, counts, size, 0), emojis.left_out
    held_out = -(-count // 20) if name == "tasks" else 0
    counts = {"train": count} | ({tasks.HELD_OUT: held_out} if held_out else {})
    per_shard = PER_SHARD if renderer == "raycast" else _PER_SLOW_SHARD
    return _BuildSpec(name, "", "", counts, size, seed, renderer, per_shard), {}


def _processes(spec: _BuildSpec, workers: int | None) -> int:
    if spec.renderer == "mitsuba":
        return 1
    if spec.kind in ("scenes", "tasks"):
        import jax

        if jax.default_backend() != "cpu":
            return 1
    return cores() if workers is None else workers


def _write_shards(spec: _BuildSpec, partial: Path, workers: int) -> dict[str, list[dict[str, Any]]]:
    """What was written, shard by shard: {"bytes": …, "captions": [length, …], "content": [hash, …]}."""
    shards = []
    for split, count in spec.counts.items():
        of = -(-count // spec.per_shard)
        shards += [_Shard(spec, split, number, of, partial) for number in range(of)]
    written: dict[str, list[dict[str, Any]]] = {split: [] for split in spec.counts}
    for shard, note in zip(shards, in_processes(_write_shard, shards, workers, spec.kind), strict=True):
        written[shard.split].append(note)
    return written


def _write_shard(shard: _Shard) -> dict[str, Any]:
    facts: dict[str, list[int]] = {"captions": [], "content": []}  # for the index: length of the shortest caption, hash

    def records() -> Iterator[bytes]:
        from tensorflow_datasets.proto import tf_example_pb2

        features = _features(shard.spec)
        for example in _examples(shard):
            captions = [read_caption(text.encode()) for text in example.get("captions") or [example["caption"]]]
            facts["captions"].append(min(map(len, captions)))
            facts["content"].append(hash_content(example["image"], captions))
            # Written out once more with its fields in order, which are otherwise in another one in every process.
            encoded = features.serialize_example(example)
            record = tf_example_pb2.Example.FromString(encoded)  # pyright: ignore[reportAttributeAccessIssue]
            yield record.SerializeToString(deterministic=True)

    return write_shard(shard.path, records, lambda file: facts)


def _examples(shard: _Shard) -> Iterator[Row]:
    spec = shard.spec
    if spec.kind == "folder":
        stored = open_stored(spec.source, Filter(min_side=spec.size))
        for number in shard.span:
            record, picture = stored.decode(number)
            picture = fit(picture, spec.size)
            known = json.dumps(record.metadata, default=str) if record.metadata else "{}"
            key = stored.key(number)
            yield {"image": png(picture), "captions": list(record.captions), "key": key, "metadata": known}
    elif spec.kind == "emoji":
        rows = emoji.open_emoji(spec.source).splits[shard.split]
        for row in rows[shard.span.start : shard.span.stop]:
            picture = fit(read_picture(row.path.read_bytes()), spec.size)
            yield {"image": png(picture), "caption": row.caption, "key": row.code}
    else:
        yield from _drawn(shard)


def _drawn(shard: _Shard) -> Iterator[Row]:
    spec, span = shard.spec, shard.span
    chunk = min(len(span), max(1, _CHUNK_PIXELS // spec.size**2))
    for start in range(span.start, span.stop, chunk):
        numbers = np.arange(start, start + chunk)  # always a full chunk: one shape, one compilation
        name = spec.kind if shard.split == "train" else f"{spec.kind}@{shard.split}"
        drawn = draw(name, numbers, spec.seed, spec.size, with_labels=True, renderer=spec.renderer or RENDERERS[0])
        for _, (picture, caption, labels) in zip(range(start, span.stop), drawn, strict=False):
            yield {"image": png(Image.fromarray(picture)), "caption": caption, "labels": json.dumps(labels)}


def _features(spec: _BuildSpec) -> Any:
    import tensorflow_datasets as tfds

    text = tfds.features.Text()
    more = {
        "folder": {"captions": tfds.features.Sequence(text), "key": text, "metadata": text},
        "emoji": {"caption": text, "key": text},
    }.get(spec.kind, {"caption": text, "labels": text})
    image = tfds.features.Image(shape=(spec.size, spec.size, 3), encoding_format="png")
    return tfds.features.FeaturesDict({"image": image, **more})


def _describe(spec: _BuildSpec, partial: Path, written: dict[str, list[dict[str, Any]]], report: BuildReport) -> None:
    """Write TensorFlow Datasets' own description of the shards, and our note; drop what only a build needs."""
    import tensorflow_datasets as tfds

    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[shard["count"] for shard in shards],
            num_bytes=sum(shard["bytes"] for shard in shards),
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=epath.Path(partial), dataset_name=spec.kind, split=split, filetype_suffix="array_record"
            ),
        )
        for split, shards in written.items()
    ]
    features = _features(spec)
    tfds.folder_dataset.write_metadata(
        data_dir=partial, features=features, split_infos=infos, version=spec.version, check_data=False
    )
    _set_format(partial / INFO, spec.kind)
    note = {key: value for key, value in dataclasses.asdict(report).items() if key != "path"}
    (partial / BUILD_FILE).write_text(json.dumps(note, indent=1))


def _set_format(info: Path, name: str) -> None:
    content = json.loads(info.read_text())
    info.write_text(json.dumps(content | {"fileFormat": "array_record", "name": name}, indent=2, sort_keys=True))


def _save_facts(out: Path, split: str, shards: list[dict[str, Any]], size: int) -> None:
    """The index of what was just written: every picture is known to be sound."""
    known = [row for shard in shards for row in zip(shard["captions"], shard["content"], strict=True)]
    store, nan = TfdsFolder(out, split), float("nan")
    facts = np.array([(size, size, length, nan, nan, nan, 0, content, 0) for length, content in known], FACTS)
    rows = np.arange(len(known), dtype=np.int64)[:, None]
    columns, flaws = make_columns([f"{split}/{row}".encode() for row in range(len(known))], rows, facts), ("",)
    head = Head(store.fingerprint(), hash_files(store), len(known), columns.digest(flaws), flaws)
    save_index(store, head, columns)


def _check(name: str, out: Path, source: str | Path | None, count: int, size: int, seed: int, overwrite: bool) -> None:
    if name not in NAMES:
        raise ValueError(f"data set {name!r} is unknown: choose {', '.join(NAMES[:-1])} or {NAMES[-1]}")
    if count < 1 or size < 8 or not 0 <= seed < 2**31:
        raise ValueError(f"count {count}, size {size}, seed {seed}: need count >= 1, size >= 8, 0 <= seed < 2147483648")
    if name == "folder" and source is None:
        raise ValueError("data set 'folder' needs --source: the folder or tar files with the images")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{str(out)!r} exists: choose another --out, or replace it with --overwrite")
    if not (out / BUILD_FILE).is_file():
        raise FileExistsError(f"{str(out)!r} is not a data set written here and is kept: choose another --out")


def _check_renderer(name: str, renderer: str) -> None:
    if renderer not in RENDERERS:
        raise ValueError(f"renderer {renderer!r} is unknown: choose {' or '.join(RENDERERS)}")
    if renderer == "mitsuba":
        if name not in ("scenes", "tasks"):
            raise ValueError(f"renderer mitsuba with data set {name!r}: only scenes and tasks are drawn here")
        check_mitsuba()


def png(picture: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
