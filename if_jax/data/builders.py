"""TensorFlow-Datasets builders: drawn scenes, or any folder of captioned images, written as array_record.

No TensorFlow is needed, here or when reading. A data set is written beside its place and renamed when complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from if_jax.data import folder, grammar, scenes
from if_jax.data.pipeline import BUILD_FILE, open_records, read_build

NAMES = ("scenes", "folder")
_CHUNK_PIXELS = 2**18  # pictures drawn at a time hold about this many pixels


@dataclasses.dataclass(frozen=True)
class Report:
    """What a build wrote; prints as what the user wants to know."""

    path: Path
    kind: str
    count: int
    size: int
    seed: int | None
    skipped: dict[str, list[str]]  # reason -> files left out for it

    def __str__(self) -> str:
        return "\n".join([f"wrote {self.count} pictures of {self.size} px to {self.path}", *_tell(self.skipped)])


class Scenes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Scenes 0 … count-1 of a seed, with caption and labels."""

    VERSION = tfds.core.Version("1.0.0")
    name = "scenes"
    url_infos = None  # nothing is downloaded, and to look for checksums TFDS needs a package it does not bring

    def __init__(self, *, count: int, size: int, seed: int, **kwargs: Any) -> None:
        self._count, self._size, self._seed = count, size, seed
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(self, self._size, labels=tfds.features.Text())

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        chunk = min(self._count, max(1, _CHUNK_PIXELS // self._size**2))
        with tqdm(total=self._count, unit="picture", desc="scenes") as bar:
            for start in range(0, self._count, chunk):
                indices = np.arange(start, start + chunk)  # always a full chunk: one shape, one compilation
                batch = scenes.sample_scenes(indices, self._seed)
                pictures = np.asarray(scenes.render_scenes(batch, self._size))
                for index, picture, scene in zip(indices, pictures, scenes.as_numpy(batch), strict=True):
                    if index < self._count:
                        yield int(index), self._example(int(index), picture, scene)
                        bar.update()

    def _example(self, index: int, picture: np.ndarray, scene: scenes.Scene) -> dict[str, Any]:
        return {
            "image": _png(Image.fromarray(picture)),
            "caption": grammar.caption(scene, np.random.default_rng((self._seed, index))),
            "labels": json.dumps(grammar.labels(scene)),
        }


class ImageFolder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A folder of images with captions, cut square and scaled; what cannot be used is noted in `skipped`."""

    VERSION = tfds.core.Version("1.0.0")
    name = "folder"
    url_infos = None  # nothing is downloaded, and to look for checksums TFDS needs a package it does not bring

    def __init__(self, *, source: Path, size: int, **kwargs: Any) -> None:
        self._source, self._size = source, size
        self.skipped: dict[str, list[str]] = {}
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(self, self._size)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        listed = folder.list_pictures(self._source)
        for index, entry in enumerate(tqdm(listed, unit="picture", desc="folder")):
            picture, problem = folder.read_picture(entry, self._size)
            if picture is None:
                self.skipped.setdefault(problem, []).append(entry.name)
            else:
                yield index, {"image": _png(picture), "caption": entry.caption}
        if sum(map(len, self.skipped.values())) == len(listed):
            raise ValueError(f"no usable picture in {str(self._source)!r}: {'; '.join(_tell(self.skipped))}")


def build(
    name: str,
    out: str | Path,
    *,
    source: str | Path | None = None,
    count: int = 10_000,
    size: int = 256,
    seed: int = 0,
    overwrite: bool = False,
) -> Report:
    """Write a data set to the folder `out`.

    Args:
      name: "scenes" (drawn here) or "folder" (images and captions from `source`).
      out: becomes a folder that `pipeline.batches`, `inspect` and `tfds.builder_from_directory` open.
      source: folder with metadata.jsonl (lines with file_name and text), or with a .txt beside each image.
      count, seed: which scenes.
      size: side of the stored pictures in pixels.
      overwrite: replace an earlier data set at `out`.

    Raises:
      FileExistsError, FileNotFoundError, ValueError: one line; nothing is left half-written.
    """
    out = Path(out)
    _check(name, out, source, count, size, seed, overwrite)
    partial = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        return _write(name, out, partial, source, count, size, seed)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def inspect(path: str | Path) -> str:
    """Describe a built data set in a few lines: how many, how large, caption lengths, what was left out, examples."""
    path = Path(path)
    note, records = read_build(path), open_records(path)
    captions = [record["caption"].decode() for record in records.__getitems__(list(range(min(len(records), 1000))))]
    lengths = [len(text.encode()) for text in captions]
    used = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    too_long = sum(length > grammar.MAX_BYTES for length in lengths)
    origin = f", seed {note['seed']}" if note["seed"] is not None else ""
    lines = [
        f"{path}: {len(records)} pictures of {note['size']} px ({note['kind']}{origin}), {used / 1e6:.1f} MB",
        f"captions: {min(lengths)} to {max(lengths)} bytes, mean {np.mean(lengths):.0f}; {too_long} of {len(lengths)} "
        f"longer than the {grammar.MAX_BYTES} that fit 77 byte-level tokens",
        *_tell(note["skipped"]),
        *(f"  {text}" for text in captions[:5]),
    ]
    return "\n".join(lines)


def _info(builder: tfds.core.DatasetBuilder, size: int, **more: Any) -> tfds.core.DatasetInfo:
    image = tfds.features.Image(shape=(size, size, 3), encoding_format="png")
    features = tfds.features.FeaturesDict({"image": image, "caption": tfds.features.Text(), **more})
    return tfds.core.DatasetInfo(builder=builder, features=features)


def _write(name: str, out: Path, partial: Path, source: str | Path | None, count: int, size: int, seed: int) -> Report:
    place = {"data_dir": str(partial), "file_format": "array_record"}
    builder: Scenes | ImageFolder
    if name == "scenes":
        builder = Scenes(count=count, size=size, seed=seed, **place)
    else:
        builder = ImageFolder(source=Path(str(source)), size=size, **place)
    tfds.disable_progress_bar()  # ours counts pictures
    with contextlib.redirect_stdout(None):  # TFDS tells where it "downloads" to: a place about to be renamed
        builder.download_and_prepare()
    skipped = getattr(builder, "skipped", {})
    written = builder.info.splits["train"].num_examples
    report = Report(out, name, written, size, seed if name == "scenes" else None, skipped)
    done = Path(builder.data_dir)
    note = {k: v for k, v in dataclasses.asdict(report).items() if k != "path"}
    (done / BUILD_FILE).write_text(json.dumps(note, indent=1))
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        out.rename(partial / "replaced")  # removed with `partial`
    done.rename(out)
    return report


def _check(name: str, out: Path, source: str | Path | None, count: int, size: int, seed: int, overwrite: bool) -> None:
    if name not in NAMES:
        raise ValueError(f"data set {name!r} is unknown: choose {' or '.join(NAMES)}")
    if count < 1 or size < 8 or not 0 <= seed < 2**31:
        raise ValueError(f"count {count}, size {size}, seed {seed}: need count >= 1, size >= 8, 0 <= seed < 2147483648")
    if name == "folder" and source is None:
        raise ValueError("data set 'folder' needs --source: the folder with the images")
    if name == "folder" and not Path(str(source)).is_dir():
        raise FileNotFoundError(f"image folder {str(source)!r} does not exist: give --source an existing folder")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{str(out)!r} exists: choose another --out, or replace it with --overwrite")
    if not (out / BUILD_FILE).is_file():
        raise FileExistsError(f"{str(out)!r} is not a data set written here and is kept: choose another --out")


def _tell(skipped: dict[str, list[str]]) -> list[str]:
    lines = []
    for reason, files in sorted(skipped.items()):
        named = ", ".join(files[:3]) + (", …" if len(files) > 3 else "")
        lines.append(f"skipped {len(files)}: {reason} ({named})")
    return lines


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
