"""Where the stages of a cascade lie, as its cascade.json says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from if_jax.checkpoints.files import read_json
from if_jax.checkpoints.stages import stage_rows


def base_folder(folder: Path) -> Path:
    """The folder of stage I in a cascade, or the folder itself."""
    if (folder / "cascade.json").is_file():
        return folder / str(cascade_rows(folder)[0]["folder"])
    return folder


def stage_folder(folder: Path, size: int) -> Path:
    """The folder of the stage of a cascade that draws pictures of a size, or the folder itself.

    Raises:
      ValueError: the cascade has no such stage.
    """
    if not (folder / "cascade.json").is_file():
        return folder
    folders = {row.get("size"): folder / str(row["folder"]) for row in cascade_rows(folder)}
    if size not in folders:
        raise ValueError(f"{folder}: no stage of it draws {size} px, but {', '.join(map(str, folders))}")
    return folders[size]


def cascade_rows(folder: Path) -> list[dict[str, Any]]:
    """The stages of cascade.json, each with the keys that `write_cascade` gives it."""
    path = folder / "cascade.json"
    content = read_json(path)
    if content.get("format") != 1:
        raise ValueError(f"{path}: format {content.get('format')!r} is unknown; this if_jax reads format 1")
    return stage_rows(path, content.get("stages"), sha256=dict)
