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
from PIL import Image

from if_jax.data import emoji
from if_jax.data.index import FACTS, Filter, Index, save_index
from if_jax.data.preprocessing import fit, read_picture
from if_jax.data.shards import PER_SHARD, continue_or_clear, finish, write_shard
from if_jax.data.sources import cores, in_processes, open_stored, summarise_skipped
from if_jax.data.tfds_folder import BUILD_FILE, INFO, Prepared
from if_jax.scenes import tasks
from if_jax.scenes.pathtrace import check_mitsuba
from if_jax.scenes.sources import RENDERERS, draw

NAMES = ("scenes", "tasks", "emoji", "folder")
_CHUNK_PIXELS = 2**18  # pictures drawn at a time hold about this many pixels
_PER_SLOW_SHARD = 16  # path-traced pictures take seconds each: what an interrupted build may lose
_VERSION = "1.1.0"

Example = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Report:
    """What a build wrote; prints as what the user wants to know."""

    path: Path
    kind: str
    count: int
    size: int
    seed: int | None
    skipped: dict[str, list[str]]  # reason -> records left out for it
    renderer: str | None = None  # of what is drawn here

    def __str__(self) -> str:
        how = " (mitsuba)" if self.renderer == "mitsuba" else ""
        return "\n".join(
            [f"wrote {self.count} pictures of {self.size} px to {self.path}{how}", *summarise_skipped(self.skipped)]
        )


@dataclasses.dataclass(frozen=True)
class _Plan:
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


@dataclasses.dataclass(frozen=True)
class _Shard:
    """One file to write: pictures first … last - 1 of a split."""

    plan: _Plan
    split: str
    number: int
    of: int
    folder: Path

    @property
    def span(self) -> range:
        first = self.number * self.plan.per_shard
        return range(first, min(first + self.plan.per_shard, self.plan.counts[self.split]))

    @property
    def path(self) -> Path:
        return self.folder / f"{self.plan.kind}-{self.split}.array_record-{self.number:05d}-of-{self.of:05d}"


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
) -> Report:
    """Write a data set to the folder `out`; the same call after an interruption goes on where it ended.

    Args:
      name: "scenes" or "tasks" (drawn here), "emoji" (Fluent 3D emoji, fetched by npm) or "folder" (any `source`).
      out: becomes a folder that `pipeline.batches`, `inspect` and `tfds.builder_from_directory` open.
      source: folder: anything `sources.open_stored` opens; emoji: folder with the two packages, if not to be fetched.
      count: scenes, tasks: how many.
      seed: which ones.
      size: side of the stored pictures in pixels.
      overwrite: replace an earlier data set at `out`.
      workers: processes; None: one per core. On an accelerator scenes are drawn by this one, and by Mitsuba always,
        which has threads of its own.
      renderer: scenes, tasks: "raycast", or "mitsuba" for the same scenes in another look, seconds a picture.

    Raises:
      FileExistsError, FileNotFoundError, ValueError: one line; nothing is left half-written.
      OSError: the disk is full, say; complete shards are kept for the next call.
    """
    out = Path(out)
    _check(name, out, source, count, size, seed, overwrite)
    _check_renderer(name, renderer)
    plan, skipped = _make_plan(name, source, count, size, seed, renderer)
    partial = out.parent / f".{out.name}.partial"
    continue_or_clear(partial, dataclasses.asdict(plan))
    written = _write_shards(plan, partial, _processes(plan, workers))
    seed = None if name in ("folder", "emoji") else seed
    report = Report(out, name, sum(plan.counts.values()), size, seed, skipped, plan.renderer)
    _describe(plan, partial, written, report)
    finish(partial, out)
    for split, examples in written.items():
        _save_facts(out, split, examples, size)
    return report


def _make_plan(
    name: str, source: str | Path | None, count: int, size: int, seed: int, renderer: str
) -> tuple[_Plan, dict[str, list[str]]]:
    if name == "folder":
        stored = open_stored(str(source), Filter(min_side=size), reindex=True)
        return _Plan(name, str(source), stored.fingerprint(), {"train": len(stored)}, size, 0), stored.left_out
    if name == "emoji":
        found = emoji.open_emoji(source)
        counts = {split: len(rows) for split, rows in found.splits.items() if rows}
        return _Plan(name, str(found.folder), found.fingerprint, counts, size, 0), found.left_out
    held_out = -(-count // 20) if name == "tasks" else 0
    counts = {"train": count} | ({tasks.HELD_OUT: held_out} if held_out else {})
    per_shard = PER_SHARD if renderer == "raycast" else _PER_SLOW_SHARD
    return _Plan(name, "", "", counts, size, seed, renderer, per_shard), {}


def _processes(plan: _Plan, workers: int | None) -> int:
    if plan.renderer == "mitsuba":
        return 1
    if plan.kind in ("scenes", "tasks"):
        import jax

        if jax.default_backend() != "cpu":
            return 1
    return cores() if workers is None else workers


def _write_shards(plan: _Plan, partial: Path, workers: int) -> dict[str, list[dict[str, Any]]]:
    """What was written, shard by shard: {"bytes": …, "captions": [length, …]}."""
    shards = []
    for split, count in plan.counts.items():
        of = -(-count // plan.per_shard)
        shards += [_Shard(plan, split, number, of, partial) for number in range(of)]
    written: dict[str, list[dict[str, Any]]] = {split: [] for split in plan.counts}
    for shard, note in zip(shards, in_processes(_write_shard, shards, workers, plan.kind), strict=True):
        written[shard.split].append(note)
    return written


def _write_shard(shard: _Shard) -> dict[str, Any]:
    captions: list[int] = []  # length of each record's shortest, for the index

    def records() -> Iterator[bytes]:
        from tensorflow_datasets.proto import tf_example_pb2

        features = _features(shard.plan)
        for example in _examples(shard):
            told = example["captions"] if "captions" in example else [example["caption"]]
            captions.append(min(map(len, told)))
            # Written out once more with its fields in order, which are otherwise in another one in every process.
            record = tf_example_pb2.Example.FromString(features.serialize_example(example))
            yield record.SerializeToString(deterministic=True)

    return write_shard(shard.path, records, lambda: {"captions": captions})


def _examples(shard: _Shard) -> Iterator[Example]:
    plan = shard.plan
    if plan.kind == "folder":
        stored = open_stored(plan.source, Filter(min_side=plan.size))
        for number in shard.span:
            record = stored[number]
            picture = fit(read_picture(record.picture), plan.size)
            known = json.dumps(record.metadata, default=str) if record.metadata else "{}"
            key = stored.key(number)
            yield {"image": png(picture), "captions": list(record.captions), "key": key, "metadata": known}
    elif plan.kind == "emoji":
        rows = emoji.open_emoji(plan.source).splits[shard.split]
        for row in rows[shard.span.start : shard.span.stop]:
            picture = fit(read_picture(row.path.read_bytes()), plan.size)
            yield {"image": png(picture), "caption": row.caption, "key": row.code}
    else:
        yield from _drawn(shard)


def _drawn(shard: _Shard) -> Iterator[Example]:
    plan, span = shard.plan, shard.span
    chunk = min(len(span), max(1, _CHUNK_PIXELS // plan.size**2))
    for start in range(span.start, span.stop, chunk):
        numbers = np.arange(start, start + chunk)  # always a full chunk: one shape, one compilation
        name = plan.kind if shard.split == "train" else f"{plan.kind}@{shard.split}"
        drawn = draw(name, numbers, plan.seed, plan.size, with_labels=True, renderer=plan.renderer)
        for _, (picture, caption, labels) in zip(range(start, span.stop), drawn, strict=False):
            yield {"image": png(Image.fromarray(picture)), "caption": caption, "labels": json.dumps(labels)}


def _features(plan: _Plan) -> Any:
    import tensorflow_datasets as tfds

    text = tfds.features.Text()
    more = {
        "folder": {"captions": tfds.features.Sequence(text), "key": text, "metadata": text},
        "emoji": {"caption": text, "key": text},
    }.get(plan.kind, {"caption": text, "labels": text})
    image = tfds.features.Image(shape=(plan.size, plan.size, 3), encoding_format="png")
    return tfds.features.FeaturesDict({"image": image, **more})


def _describe(plan: _Plan, partial: Path, written: dict[str, list[dict[str, Any]]], report: Report) -> None:
    """Write TensorFlow Datasets' own description of the shards, and our note; drop what only a build needs."""
    import tensorflow_datasets as tfds

    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[shard["count"] for shard in shards],
            num_bytes=sum(shard["bytes"] for shard in shards),
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=partial, dataset_name=plan.kind, split=split, filetype_suffix="array_record"
            ),
        )
        for split, shards in written.items()
    ]
    features = _features(plan)
    tfds.folder_dataset.write_metadata(
        data_dir=partial, features=features, split_infos=infos, version=plan.version, check_data=False
    )
    _set_format(partial / INFO, plan.kind)
    note = {key: value for key, value in dataclasses.asdict(report).items() if key != "path"}
    (partial / BUILD_FILE).write_text(json.dumps(note, indent=1))


def _set_format(info: Path, name: str) -> None:
    content = json.loads(info.read_text())
    info.write_text(json.dumps(content | {"fileFormat": "array_record", "name": name}, indent=2, sort_keys=True))


def _save_facts(out: Path, split: str, shards: list[dict[str, Any]], size: int) -> None:
    """The index of what was just written: every picture is known to be sound."""
    lengths = [length for shard in shards for length in shard["captions"]]
    store, nan = Prepared(out, split), float("nan")
    keys = np.array([f"{split}/{row}".encode() for row in range(len(lengths))], bytes)
    facts = np.array([(size, size, length, nan, nan, nan, 0) for length in lengths], FACTS)
    places = np.arange(len(lengths), dtype=np.int64)[:, None]
    save_index(store, Index(store.fingerprint(), keys, places, facts, ("",)))


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
