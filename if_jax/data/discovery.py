"""Which files or folders a source is made of, by what is there; what is there and not read is named."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from typing import NamedTuple

from if_jax.data.arrow import ArrowFile, image_column, read_schema
from if_jax.data.folder import Folder
from if_jax.data.folder_entries import METADATA, is_picture, walk_folders
from if_jax.data.patterns import expand
from if_jax.data.preprocessing import SUFFIXES
from if_jax.data.reading import as_path, list_folder, read_file
from if_jax.data.records import RecordStore
from if_jax.data.remote import DataPath, RemotePath, RemoteSettings, forget_listings
from if_jax.data.tars import COMPRESSED, Tar
from if_jax.data.tfds_folder import TfdsFolder, find_tfds_folder

_ARCHIVES = (".zip", ".7z", ".rar", ".tar.lz4")
_LISTS = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".gz", ".npz")
_SPLIT = re.compile(r"(?:^|[-_./])(train|test|validation|valid|val|dev|eval)(?=[-_./]|$)")
_COMPRESSED = "compressed tar, which has no random access: unpack it to a plain .tar"


class Discovery(NamedTuple):
    """The parts of a source, not yet indexed."""

    stores: tuple[RecordStore, ...]
    unread: dict[str, list[str]]  # reason -> names of what is there and no part


def discover(source: str, settings: RemoteSettings = RemoteSettings()) -> Discovery:  # noqa: B008 (frozen)
    """Find the parts of a source.

    Args:
      source: names and patterns of files, folders and prepared data sets, as `patterns.expand` takes them.
      settings: of buckets.

    Raises:
      FileNotFoundError, ValueError: one line that says what is wrong with the source.
    """
    stores: list[RecordStore] = []
    unread: dict[str, list[str]] = {}
    forget_listings()
    for name, split in expand(str(source), settings):
        path = as_path(name, settings)
        if path.is_file():
            part = Discovery((_open_file(path, split),), {})
        elif path.is_dir():
            part = _open_folder(path, split)
        elif isinstance(path, RemotePath):
            raise FileNotFoundError(
                f"data source {name!r} does not exist: check the bucket's name, and what lies in it"
            )
        else:
            part = Discovery((_open_by_name(name, split),), {})
        stores += part.stores
        for reason, names in part.unread.items():
            unread.setdefault(reason, []).extend(names)
    return Discovery(tuple(stores), unread)


def find_record_stores(
    source: str,
    settings: RemoteSettings = RemoteSettings(),  # noqa: B008 (frozen)
) -> tuple[RecordStore, ...]:
    """The files or folders a source is made of, not yet indexed; arguments and errors as of `discover`."""
    return discover(source, settings).stores


def _open_file(path: DataPath, split: str) -> RecordStore:
    name = path.name.lower()
    if split:
        raise ValueError(f"{str(path)!r}: only prepared data sets have splits (@{split})")
    if name.endswith(".tar"):
        return Tar(path)
    if name.endswith((".parquet", ".arrow")):
        return ArrowFile(path)
    if name.endswith((*COMPRESSED, *_ARCHIVES)):
        raise ValueError(
            f"{str(path)!r} is compressed and has no random access: unpack it, to a folder or a plain .tar"
        )
    if name.endswith(tuple(SUFFIXES)):
        raise ValueError(f"{str(path)!r} is one picture: name the folder it is in")
    if name.endswith(_LISTS):
        raise ValueError(
            f"{str(path)!r} is a list, not pictures: img2dataset fetches what it lists; or name a folder of pictures"
        )
    raise ValueError(
        f"{str(path)!r} is of no kind that is read: give a folder, tar files or Parquet with pictures inside"
    )


def _open_by_name(name: str, split: str) -> RecordStore:
    if folder := find_tfds_folder(name):
        return TfdsFolder(folder, split or "train")
    if name.endswith(".tar"):
        raise FileNotFoundError(f"tar {name!r} does not exist: check the name")
    raise FileNotFoundError(
        f"data source {name!r} does not exist: give a folder, tar files, a prepared data set, or build one with "
        "`if-jax data build`"
    )


def _open_folder(path: DataPath, split: str) -> Discovery:
    names = {entry.name for entry in list_folder(path)}
    if "dataset_dict.json" in names or any(name.endswith(".arrow") for name in names):
        return _open_hugging_face(path, names, split)
    if folder := find_tfds_folder(path):
        return Discovery((TfdsFolder(folder, split or "train"),), {})
    if tables := _tables_with_pictures(path, names):
        return _of_split(path, tables, split)
    if part := _split_of_folder(path, names, split):
        return part
    if split:
        raise ValueError(f"{f'{path}@{split}'!r}: only prepared data sets have splits (@{split})")
    if tars := _tars(path, names):
        return tars
    return Discovery((Folder(path),), {})


def _open_hugging_face(path: DataPath, names: set[str], split: str) -> Discovery:
    """What `save_to_disk` writes (splits in folders, or one data set), or the cache of Arrow files."""
    if "dataset_dict.json" in names:
        splits = json.loads(read_file(path / "dataset_dict.json")).get("splits", [])
        chosen = split or ("train" if "train" in splits or len(splits) != 1 else splits[0])
        if chosen not in splits or not (path / chosen).is_dir():
            raise ValueError(f"{str(path)!r} has no split {chosen!r}: it has {', '.join(sorted(splits))}")
        part = _open_folder(path / chosen, "")
        return Discovery(part.stores, _other_splits(split, (name for name in splits if name != chosen)))
    files = [path / name for name in sorted(names) if name.endswith(".arrow")]
    if "state.json" in names:
        state = json.loads(read_file(path / "state.json"))
        files = [path / part["filename"] for part in state.get("_data_files", [])]
        if missing := [file for file in files if not file.is_file()]:
            raise FileNotFoundError(f"{str(missing[0])!r} is missing: copy the data set again")
    return _of_split(path, files, split)


def _tables_with_pictures(path: DataPath, names: set[str]) -> list[DataPath]:
    """Parquet files that hold the pictures themselves; none where they only go with pictures or tars that are there."""
    if any(name.endswith(".tar") for name in names):
        return []
    tables = [path / name for name in sorted(names) if name.endswith(".parquet") and name not in METADATA]
    if not tables and "data" in names and (path / "data").is_dir():
        below = (listing.path / name for listing in walk_folders(path / "data") for name in listing.files)
        tables = sorted(file for file in below if file.suffix == ".parquet" and file.name not in METADATA)
    if not tables:
        return []
    beside = any(is_picture(name) for listing in walk_folders(path) for name in listing.files)
    try:
        if image_column(read_schema(tables[0])) is not None:
            return tables
    except ValueError:
        if not beside:
            raise
    if beside:
        return []
    ArrowFile(tables[0])  # says what is wrong with it
    raise AssertionError


def _of_split(path: DataPath, files: list[DataPath], split: str) -> Discovery:
    """Those of some tables that a split is made of, by their names."""
    splits = {file: _split_name(os.path.relpath(str(file), str(path))) for file in files}
    known = sorted({name for name in splits.values() if name})
    chosen = split or ("train" if "train" in known or not known else known[0])
    if split and split not in known:
        raise ValueError(f"{str(path)!r} has no split {split!r}: it has {', '.join(known) or 'one part only'}")
    used = [file for file, name in splits.items() if name in (chosen, "")]
    others = (file.name for file in files if file not in used)
    return Discovery(tuple(map(ArrowFile, used)), _other_splits(split, others))


def _split_name(file: str) -> str:
    match = _SPLIT.search(file)
    return match[1] if match else ""


def _split_of_folder(path: DataPath, names: set[str], split: str) -> Discovery | None:
    """A Hugging Face folder of pictures whose splits are folders with a metadata file each; None where it is none."""
    if names & set(METADATA):
        return None
    folders = [name for name in sorted(names) if (path / name).is_dir()]
    parts = [name for name in folders if any((path / name / file).is_file() for file in METADATA)]
    chosen = split or ("train" if "train" in parts else "")
    if chosen not in parts and not (split and split in folders):
        return None
    others = (name for name in parts if name != chosen)
    return Discovery((Folder(path / chosen),), _other_splits(split, others))


def _other_splits(split: str, names: Iterable[str]) -> dict[str, list[str]]:
    """What goes unread where no split was asked for."""
    listed = [] if split else list(names)
    return {"of another split, which @NAME behind the source reads": listed} if listed else {}


def _tars(path: DataPath, names: set[str]) -> Discovery | None:
    """The tars of a folder, or of the folders below it where no pictures lie about; None where there are none."""
    at_top = any(name.endswith(".tar") for name in names)
    tars: list[DataPath] = []
    unread: dict[str, list[str]] = {}
    for listing in walk_folders(path):
        for name in listing.files:
            file = listing.path / name
            shown = os.path.relpath(str(file), str(path))
            if is_picture(name):
                if not at_top:
                    return None
                unread.setdefault("picture beside tar files, which are read instead", []).append(shown)
            elif name.endswith(".tar"):
                tars.append(file)
            elif name.lower().endswith((*COMPRESSED, *_ARCHIVES)):
                unread.setdefault(_COMPRESSED if ".t" in name.lower() else "archive: unpack it", []).append(shown)
    if not tars and unread:
        reason, files = next(iter(unread.items()))
        raise ValueError(f"{str(path)!r} holds no tar file that is read: {files[0]} is a {reason}")
    return Discovery(tuple(Tar(tar) for tar in sorted(tars)), unread) if tars else None
