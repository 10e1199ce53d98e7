"""Stored records of every kind, written the way other people's tools write them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
import webdataset
from array_record.python import array_record_module
from PIL import Image

SIDE = 20


def picture(number: int, side: tuple[int, int] = (SIDE + 4, SIDE)) -> Image.Image:
    """A picture whose colour tells its number."""
    return Image.new("RGB", side, (number % 250, number * 7 % 250, 90))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_folder(path: Path, count: int) -> Path:
    path.mkdir(parents=True)
    for i in range(count):
        (path / f"{i:04d}.png").write_bytes(encoded(picture(i)))
        (path / f"{i:04d}.txt").write_text(f"Picture number {i}")
    return path


def write_tars(path: Path, count: int, per_tar: int) -> Path:
    """As img2dataset lays them out: SHARD.tar of KEY.jpg, KEY.txt and KEY.json, uneven at the end."""
    path.mkdir(parents=True)
    for shard in range(-(-count // per_tar)):
        with webdataset.TarWriter(str(path / f"{shard:05d}.tar")) as tar:
            for i in range(shard * per_tar, min((shard + 1) * per_tar, count)):
                known = {"caption": f"picture number {i}", "similarity": 0.2 + i / 1000, "pwatermark": i % 10 / 10}
                tar.write(
                    {
                        "__key__": f"{shard:05d}{i:04d}",
                        "jpg": encoded(picture(i), "JPEG"),
                        "txt": f"picture number {i}",
                        "json": json.dumps(known).encode(),
                    }
                )
    return path


def write_prepared(path: Path, name: str, features: Any, examples: list[dict[str, Any]]) -> Path:
    """A data set as TensorFlow Datasets prepares it with file_format=array_record."""
    path.mkdir(parents=True)
    file = path / f"{name}-train.array_record-00000-of-00001"
    writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1")
    for example in examples:
        writer.write(features.serialize_example(features.encode_example(example)))
    writer.close()
    template = tfds.core.ShardedFileTemplate(
        data_dir=path, dataset_name=name, split="train", filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo("train", [len(examples)], file.stat().st_size, template)
    tfds.folder_dataset.write_metadata(
        data_dir=path, features=features, split_infos=[split], version="1.0.0", check_data=False
    )
    info = json.loads((path / "dataset_info.json").read_text())
    (path / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "array_record", "name": name}))
    return path


def coco_like(count: int) -> tuple[Any, list[dict[str, Any]]]:
    """Features laid out as coco_captions has them, several captions to a picture."""
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "image/filename": tfds.features.Text(),
            "captions": tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()}),
        }
    )
    examples = [
        {
            "image": encoded(picture(i), "JPEG"),
            "image/filename": f"{i}.jpg",
            "captions": [{"id": 10 * i + k, "text": f"caption {k} of {i}"} for k in range(3)],
        }
        for i in range(count)
    ]
    return features, examples
