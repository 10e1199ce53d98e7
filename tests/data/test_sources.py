"""Stored records: every kind of shelf read in place, the same ids for every reader, and every loss named."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import shelves
import tensorflow_datasets as tfds
import webdataset

from if_jax.data import clevr, pipeline, sources
from if_jax.data.index import Filter
from if_jax.text.tokens import load_tokenizer

COUNT = 23


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("stored")
    return {
        "folder": str(shelves.write_folder(root / "folder", COUNT)),
        "tars": str(shelves.write_tars(root / "tars", COUNT, 10)),
        "prepared": str(shelves.write_prepared(root / "prepared", "coco", *shelves.coco_like(COUNT))),
        "mixture": f"1*{root / 'folder'} + 3*{root / 'tars'}",
    }


def _batches(source: str, steps: int, start: int = 0, **changes: object) -> list[dict[str, np.ndarray]]:
    options = {"size": 8, "batch_size": 8, "seed": 5, "tokenize": load_tokenizer("bytes"), "threads": 0}
    made = pipeline.batches(source, start_step=start, **(options | changes))
    return [next(made) for _ in range(steps)]


def _equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", ["folder", "tars", "prepared", "mixture"])
def test_the_first_thousand_ids_are_the_same_for_one_two_and_four_hosts_and_after_a_restart(
    kind: str, stored: dict[str, str]
) -> None:
    steps = 125 if kind == "tars" else 25
    whole = _batches(stored[kind], steps)
    ids = np.concatenate([batch["index"] for batch in whole])
    assert len(ids) == 8 * steps
    for hosts in (2, 4):
        parts = [_batches(stored[kind], steps, shard_index=i, shard_count=hosts) for i in range(hosts)]
        rows = [np.concatenate([part[k]["index"] for part in parts]) for k in range(steps)]
        np.testing.assert_array_equal(np.concatenate(rows), ids)
    step = int(np.random.default_rng(3).integers(2, steps - 5))
    again = _batches(stored[kind], 5, step)
    assert all(_equal(a, b) for a, b in zip(again, whole[step : step + 5], strict=True))
    if kind != "mixture":
        epochs = ids[: len(ids) // COUNT * COUNT].reshape(-1, COUNT)
        assert (np.sort(epochs, axis=1) == np.arange(COUNT)).all()
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_worker_processes_give_the_same_batches(stored: dict[str, str]) -> None:
    alone = _batches(stored["tars"], 5, 2)
    made = _batches(stored["tars"], 5, 2, workers=2)
    assert all(_equal(a, b) for a, b in zip(alone, made, strict=True))
    with pytest.raises(ValueError, match="workers 1 with 'scenes'"):
        _batches("scenes", 1, workers=1)


def test_every_shelf_gives_picture_and_captions_by_number(stored: dict[str, str]) -> None:
    for kind in ("folder", "tars", "prepared"):
        opened = sources.open_stored(stored[kind])
        assert len(opened) == COUNT and not opened.left_out
        assert (opened.facts("width") == shelves.SIDE + 4).all()
        assert "7" in opened[7].captions[0]
    tars = sources.open_stored(stored["tars"])
    assert tars.key(12) == "00001/000010012" and tars[12].metadata["similarity"] == pytest.approx(0.212)
    assert sources.open_stored(stored["prepared"])[4].captions == tuple(f"caption {k} of 4" for k in range(3))


def test_a_mixture_keeps_its_weights_and_walks_through_every_part(stored: dict[str, str]) -> None:
    ids = np.concatenate([batch["index"] for batch in _batches(stored["mixture"], 46)])
    part = ids // 2**48
    assert abs((part == 1).mean() - 0.75) < 0.01
    for which in (0, 1):
        own = (ids % 2**48)[part == which]
        assert sorted(own[:COUNT]) == list(range(COUNT))
    for wrong in ("0.5*scenes + tasks", "0*scenes + 1*tasks"):
        with pytest.raises(ValueError, match="mixture"):
            pipeline.parse_mixture(wrong)


def test_several_captions_take_turns(stored: dict[str, str]) -> None:
    source = pipeline.Pictures(stored["prepared"], 8, 0, pipeline.Preparation(), Filter())
    samples = source.read(range(3 * COUNT))
    assert {sample.choice for sample in samples} == {0, 1, 2}
    assert all(sample.caption == f"caption {sample.choice} of {sample.number}" for sample in samples)


def test_filters_use_the_columns_there_are(stored: dict[str, str]) -> None:
    clear = sources.open_stored(stored["tars"], Filter(min_clip=0.205, max_watermark=0.45))
    assert len(clear) == 8 and all(record.metadata["pwatermark"] < 0.45 for record in clear)
    counts = Counter({reason: len(keys) for reason, keys in clear.left_out.items()})
    assert counts == {"CLIP score below 0.205": 5, "watermark above 0.45": 10} and len(clear) + counts.total() == COUNT
    assert len(sources.open_stored(stored["folder"], Filter(min_clip=0.9))) == COUNT  # no such column: all pass
    with pytest.raises(ValueError, match=r"no usable picture in .*: skipped 23: longer than 1.1 times its width"):
        sources.open_stored(stored["folder"], Filter(max_aspect=1.1))


def test_a_tar_that_is_not_as_it_should_be(tmp_path: Path) -> None:
    whole = next(shelves.write_tars(tmp_path / "whole", 6, 6).glob("*.tar"))
    content, ends = whole.read_bytes(), "tar is damaged or ends too early: samples after this are lost"
    with tarfile.open(whole) as tar:
        third = next(member for member in tar if member.name.endswith("0002.jpg"))
    cut, boundary, rubbish = (tmp_path / f"{name}.tar" for name in ("cut", "boundary", "rubbish"))
    cut.write_bytes(content[: third.offset_data + 100])
    boundary.write_bytes(content[: third.offset])
    rubbish.write_bytes(b"no tar at all" * 100)
    for path in (cut, boundary):
        opened = sources.open_stored(str(path))
        assert len(opened) == 2 and ends in opened.left_out
    with pytest.raises(ValueError, match=r"no usable picture.*tar is damaged"):
        sources.open_stored(str(rubbish))
    tarfile.open(tmp_path / "empty.tar", "w").close()
    with pytest.raises(ValueError, match=r"no usable picture in .*: it is empty"):
        sources.open_stored(str(tmp_path / "empty.tar"))
    bare = tmp_path / "bare.tar"
    with webdataset.TarWriter(str(bare)) as tar:
        for i in range(3):
            tar.write({"__key__": str(i), "png": shelves.encoded(shelves.picture(i))})
    with pytest.raises(ValueError, match=r"no usable picture in .*: skipped 3: no caption"):
        sources.open_stored(str(bare))


def test_of_duplicate_keys_the_first_sound_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "twice.tar"
    files = [("a.png", b"rot"), ("a.txt", b"first a"), ("b.png", None), ("b.txt", b"first b"), ("a.png", None)]
    files += [("a.txt", b"second a"), ("b.png", None), ("b.txt", b"second b"), ("README", b"no sample")]
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            data = shelves.encoded(shelves.picture(1)) if data is None else data
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    opened = sources.open_stored(str(path))
    assert [record.captions[0] for record in opened] == ["first b", "second a"]
    expected = {"unreadable image": ["a"], "duplicate key": ["b"], "name without an extension": ["README"]}
    assert opened.left_out == expected


def test_an_index_is_made_once_and_a_changed_shelf_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = next(shelves.write_tars(tmp_path / "tars", 4, 4).glob("*.tar"))
    first = sources.open_stored(str(tar))
    monkeypatch.setattr(sources, "build_index", None)  # a second look would fail
    assert sources.open_stored(str(tar)).fingerprint() == first.fingerprint()
    monkeypatch.undo()
    os.utime(tar, ns=(0, tar.stat().st_mtime_ns + 1))
    with pytest.raises(ValueError, match=r"has changed since it was indexed.*--reindex") as caught:
        sources.open_stored(str(tar))
    assert "\n" not in str(caught.value)
    sources.open_stored(str(tar), follow=True)
    folder = shelves.write_folder(tmp_path / "folder", 3)
    sources.open_stored(str(folder))
    (folder / "0001.txt").write_text("another caption")
    with pytest.raises(ValueError, match="has changed since it was indexed"):
        sources.open_stored(str(folder))
    tar.with_name(f"{tar.name}.index.npz").write_bytes(b"half an index")
    assert len(sources.open_stored(str(tar))) == 4


def test_sources_that_are_none_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "urls").mkdir()
    (tmp_path / "urls" / "part-0.parquet").touch()
    (tmp_path / "a.tar.gz").touch()
    (tmp_path / "empty").mkdir()
    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=2)}
    )
    example = {"image": shelves.encoded(shelves.picture(0)), "label": 1}
    mute = shelves.write_prepared(tmp_path / "mute", "mute", features, [example])
    cases = {
        str(tmp_path / "urls"): "holds addresses, not pictures: img2dataset",
        str(tmp_path / "a.tar.gz"): "is compressed",
        str(tmp_path / "b.tar"): "does not exist",
        str(tmp_path / "empty"): "lists no image",
        str(mute): "has no captions: its features are image, label",
        str(mute) + "@test": "has no split 'test': it has train",
        "coco_captions": r"not prepared below .*needs TensorFlow: pip install 'if_jax\[tf\]'",
        str(tmp_path / "gone"): "does not exist: give a folder",
    }
    for source, words in cases.items():
        with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
            sources.open_stored(source)
        assert "\n" not in str(caught.value)


def test_clevr_through_its_own_schema(tmp_path: Path) -> None:
    features = tfds.builder("clevr", data_dir=tmp_path).info.features
    colours, shapes = features["objects"]["color"].names, features["objects"]["shape"].names

    def thing(size: int, colour: str, material: int, shape: str, x: float, depth: float) -> dict:
        numbers = {"size": size, "color": colours.index(colour), "material": material, "shape": shapes.index(shape)}
        return numbers | {"rotation": 0.0, "3d_coords": [0, 0, 0], "pixel_coords": [x, 100, depth]}

    scenes = [
        [
            thing(1, "red", 1, "cube", 100, 9),
            thing(0, "cyan", 0, "sphere", 300, 12),
            thing(1, "red", 1, "cube", 200, 9),
        ],
        [thing(0, "gray", 1, "cylinder", 240, 8)],
    ]
    examples = [
        {
            "image": shelves.encoded(shelves.picture(i, (48, 32))),
            "file_name": f"{i}.png",
            "objects": objects,
            "question_answer": [],
        }
        for i, objects in enumerate(scenes)
    ]
    path = shelves.write_prepared(tmp_path / "clevr" / "3.1.0", "clevr", features, examples)
    opened = sources.open_stored(str(path.parent))  # its one version is found
    assert set(opened[0].captions) >= {
        "a scene with three objects",
        "two cubes and a sphere",
        "two red cubes and a cyan sphere",
        "two red metal cubes and a cyan rubber sphere",
        "two large red metal cubes and a small cyan rubber sphere",
    }
    assert not any("left of a large red" in caption for caption in opened[0].captions)  # which of the two?
    assert opened[1].captions[-1] == "a small gray metal cylinder"
    one, other = scenes[0][:2]
    told = clevr.captions({field: [one[field], other[field]] for field in clevr.FIELDS}, _names(features))
    assert "a large red metal cube left of a small cyan rubber sphere" in told
    assert "a small cyan rubber sphere behind a large red metal cube" in told
    assert not any("cube behind" in caption or "cube right of" in caption for caption in told)


def _names(features: tfds.features.FeaturesDict) -> dict[str, tuple[str, ...]]:
    return {name: tuple(features["objects"][name].names) for name in ("color", "material", "shape", "size")}


def test_mock_data_of_no_meaning_is_left_out_not_lied_about() -> None:
    objects = {field: [0] * (i + 1) for i, field in enumerate(clevr.FIELDS)}
    with pytest.raises(ValueError, match="differ in length"):
        clevr.captions(objects)
    assert json.dumps(clevr.captions({field: [] for field in clevr.FIELDS})) == '["an empty scene"]'
