"""Data as people have it: what can be read is read, and what is there and not read is named with its true reason."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import record_stores
from click.testing import CliRunner

from if_jax.cli_data import data
from if_jax.data import sources
from if_jax.data.mixtures import parse_mixture

PICTURE = record_stores.encoded(record_stores.picture(1), "JPEG")


def _files(folder: Path, *names: str, **contents: str) -> Path:
    """Pictures, and a caption in every other file; or what a name is given as content."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            PICTURE if name.endswith(("jpg", "png")) else contents.get(path.suffix[1:], "a thing").encode()
        )
    return folder


def _tar(path: Path, *names: str, mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name in names:
            data = PICTURE if name.endswith("jpg") else name.encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def _table(picture: object = PICTURE, **columns: list[object]) -> pyarrow.Table:
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    pictures = pyarrow.array([{"bytes": picture, "path": "a.jpg"}] * 2, kind)
    return pyarrow.table({"image": pictures} | (columns or {"text": ["one", "two"]}))


def _captions(source: object, left_out: dict[str, list[str]] | None = None) -> list[str]:
    opened = sources.open_stored(str(source))
    assert opened.left_out == (left_out or {})
    assert len({opened.key(number) for number in range(len(opened))}) == len(opened)
    return [text for record in opened for text in record.captions]


def test_what_img2dataset_writes_as_files(tmp_path: Path) -> None:
    folder = _files(tmp_path / "files", "00000/01.jpg", "00000/01.txt", "00000/02.jpg", "00000_stats.json")
    known = {"caption": "from json", "similarity": 0.3}
    for name in ("01", "02"):
        (folder / f"00000/{name}.json").write_text(json.dumps(known))
    pyarrow.parquet.write_table(pyarrow.table({"url": ["http://a"], "caption": ["x"]}), folder / "00000.parquet")
    other = {"not a kind of picture read here": ["00000.parquet", "00000_stats.json"]}
    assert _captions(folder, other) == ["a thing", "from json"]
    assert sources.open_stored(str(folder)).facts("clip") == pytest.approx([0.3, 0.3])


def test_tables_with_pictures_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = _files(tmp_path / "hub", "README.md", "assets/logo.png")
    (hub / "data").mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        pyarrow.parquet.write_table(_table(), hub / "data" / f"{name}.parquet", row_group_size=1)
    others = {"of another split, which @NAME behind the source reads": ["test-00000-of-00001.parquet"]}
    assert _captions(hub, others) == ["one", "two"] * 2
    assert len(sources.open_stored(f"{hub}@test")) == 2
    bare = tmp_path / "bare.parquet"
    pyarrow.parquet.write_table(_table(None), bare)
    for table, words in (
        (_table(None), r"skipped 2: picture is not inside: only its path is"),
        (_table(label=[1, 2]), "has no captions: its columns are image, label"),
        (pyarrow.table({"a": [1]}), "holds no pictures: its columns are a"),
    ):
        pyarrow.parquet.write_table(table, bare)
        with pytest.raises(ValueError, match=words):
            sources.open_stored(str(bare))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"is read by pyarrow, which is not installed: pip install pyarrow"):
        sources.open_stored(str(bare))


def test_what_save_to_disk_writes(tmp_path: Path) -> None:
    for split in ("train", "test"):
        folder = tmp_path / "saved" / split
        folder.mkdir(parents=True)
        table = _table(caption=[f"{split} {i}" for i in range(2)])
        with pyarrow.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as stream:
            stream.write_table(table, max_chunksize=1)
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
        (folder / "dataset_info.json").write_text("{}")
    (tmp_path / "saved/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    others = {"of another split, which @NAME behind the source reads": ["test"]}
    assert _captions(tmp_path / "saved", others) == ["train 0", "train 1"]
    assert _captions(tmp_path / "saved/test") == ["test 0", "test 1"]
    with pytest.raises(ValueError, match="has no split 'val': it has test, train"):
        sources.open_stored(f"{tmp_path / 'saved'}@val")


def test_folders_with_metadata(tmp_path: Path) -> None:
    line = lambda **fields: json.dumps(fields) + "\n"  # noqa: E731
    column = _files(tmp_path / "column", "1.jpg", "metadata.jsonl", jsonl=line(file_name="1.jpg", caption="a ball"))
    below = _files(
        tmp_path / "below", *(f"{split}/{name}" for split in ("train", "test") for name in ("1.jpg", "2.jpg"))
    )
    for split in ("train", "test"):
        lines = line(file_name="1.jpg", text=split) + line(file_name="2.jpg", text=["two", "three"])
        (below / split / "metadata.jsonl").write_text(lines)
    table = _files(
        tmp_path / "csv", "1.jpg", "metadata.csv", csv="\ufefffile_name,text,clip_score\n1.jpg,a ball,0.25\n"
    )
    windows = _files(tmp_path / "w", "img/1.jpg", "metadata.jsonl", jsonl=line(file_name="img\\1.jpg", text="a ball"))
    cache = _files(
        tmp_path / "hub", "blobs/b1.jpg", "snapshots/abc/metadata.jsonl", jsonl=line(file_name="1.jpg", text="a ball")
    )
    (cache / "snapshots/abc/1.jpg").symlink_to("../../blobs/b1.jpg")
    for folder in (column, table, windows, cache / "snapshots/abc"):
        assert _captions(folder) == ["a ball"]
    assert sources.open_stored(str(table)).facts("clip") == pytest.approx([0.25])
    others = {"of another split, which @NAME behind the source reads": ["test"]}
    assert _captions(below, others) == ["train", "two", "three"] and _captions(f"{below}@test")[0] == "test"
    mute = _files(tmp_path / "mute", "1.jpg", "metadata.jsonl", jsonl=line(file_name="1.jpg", label=3))
    with pytest.raises(ValueError, match=r"no caption: metadata.jsonl has no column text or caption"):
        sources.open_stored(str(mute))


def test_links_cases_and_dots(tmp_path: Path) -> None:
    _files(tmp_path / "store", "far.jpg", "far.txt")
    linked = _files(tmp_path / "linked", "near.jpg", "near.TXT")
    (linked / "more").symlink_to("../store")
    (linked / "round").symlink_to(".")
    assert _captions(linked, {"link to a folder that is read already": ["round"]}) == ["a thing"] * 2
    tar = _tar(tmp_path / "0.tar", "22.05.jpg", "22.05.txt", "22.06.jpg", "22.06.txt", "1.jpg", "1.txt", "1.seg.jpg")
    assert _captions(tar) == ["22.05.txt", "22.06.txt", "1.txt"]
    beside = _tar(tmp_path / "1.tar", "3.jpg", "3.txt", "3.5.jpg", "3.5.txt")
    assert _captions(beside) == ["3.txt", "3.5.txt"]
    assert _captions(_tar(tmp_path / "2.tar", "1.jpg", "2.jpg", "1.txt", "2.txt")) == ["1.txt", "2.txt"]


def test_ways_to_name_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = tmp_path / "me@lab"
    names = [f"part-{part}/{number:05d}" for part in (0, 1) for number in (0, 1)]
    for name in names:
        _tar(shards / f"{name}.tar", f"{name.replace('/', '-')}.jpg", f"{name.replace('/', '-')}.txt")
    monkeypatch.chdir(shards)
    monkeypatch.setenv("HOME", str(tmp_path))
    captions = [f"{name.replace('/', '-')}.txt" for name in names]
    for source, rows in {
        ".": (0, 1, 2, 3),
        "part-*/*.tar": (0, 1, 2, 3),
        "part-0/0000[01].tar": (0, 1),
        "part-0/{00000..00001}.tar": (0, 1),
        "part-{1,0}/00000.tar": (2, 0),
        "part-0/00001.tar::part-1": (1, 2, 3),
        "~/me@lab/part-1/*.tar": (2, 3),
        str(shards / "part-0/{00000..00001}.tar"): (0, 1),
    }.items():
        assert _captions(source) == [captions[row] for row in rows], source
    _files(tmp_path, "pictures.zip", "list.tsv", "one.jpg")
    for source, words in {
        "../pictures.zip": "is compressed and has no random access: unpack it",
        "../list.tsv": "is a list, not pictures",
        "../one.jpg": "is one picture: name the folder it is in",
        "ftp2://bucket/{00000..00001}.tar": "nothing known opens ftp2://: use gs://",
        "": "is empty: give a folder",
        "part-*/*.tgz": "nothing matches 'part-.*tgz'",
        "part-{0,7}/00000.tar": "tar 'part-7/00000.tar' does not exist",
        "part-0@test": "only prepared data sets have splits",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
            sources.open_stored(source)
        assert "\n" not in str(caught.value)
    _tar(shards / "2024.tar", "9.jpg", "9.txt")
    assert parse_mixture("2*.tar") == [(1.0, "2*.tar")] and _captions("2*.tar") == ["9.txt"]
    assert parse_mixture("2*part-0") == [(2.0, "part-0")]
    assert parse_mixture("0.5*2*.tar + 1*scenes") == [(0.5, "2*.tar"), (1.0, "scenes")]


def test_what_lies_beside_tars_is_named(tmp_path: Path) -> None:
    _tar(tmp_path / "0.tar", "1.jpg", "1.txt")
    _tar(tmp_path / "1.tar.gz", "2.jpg", "2.txt", mode="w:gz")
    _files(tmp_path, "loose.jpg", "more.zip")
    left_out = {
        "compressed tar, which has no random access: unpack it to a plain .tar": ["1.tar.gz"],
        "archive: unpack it": ["more.zip"],
        "picture beside tar files, which are read instead": ["loose.jpg"],
    }
    assert _captions(tmp_path, left_out) == ["1.txt"]
    (tmp_path / "0.tar").unlink()
    os.unlink(tmp_path / "loose.jpg")
    with pytest.raises(ValueError, match=r"holds no tar file that is read: 1\.tar\.gz is a compressed tar"):
        sources.open_stored(str(tmp_path))


def test_a_sheet_is_written_into_a_device_and_not_over_it(tmp_path: Path) -> None:
    _files(tmp_path / "pictures", "1.jpg", "1.txt")
    os.mkfifo(tmp_path / "pipe")  # stands for /dev/null
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    arguments = ["inspect", str(tmp_path / "pictures"), "--sheet", str(tmp_path / "pipe"), "--overwrite"]
    done = CliRunner().invoke(data, arguments, catch_exceptions=False)
    assert done.exit_code == 0 and (tmp_path / "pipe").is_fifo()
    assert os.read(reader, 4) == b"\x89PNG"
    os.close(reader)
