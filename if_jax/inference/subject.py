"""What DreamBooth trains on (Ruiz et al. 2022, arXiv:2208.12242): a subject's pictures, and its class as drawn so far.

    OUT/instance/   the pictures, all with one caption: "a photo of a sks dog"
    OUT/class/      0000.png, …: "a photo of a dog", drawn by the cascade before it is trained

Trained on both in equal parts, a stage learns the subject and keeps what it knew of the class (prior preservation).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from if_jax.checkpoints.files import atomic_file, read_json
from if_jax.data.folder_entries import METADATA, is_picture
from if_jax.inference.cascade import Cascade

_NOTE = "drawn.json"  # in the folder of the class: what its pictures depend on
_TILE = 8  # pictures in one program
ClassProgress = Callable[[str, int, int], None]  # what, pictures done, of how many


def write_subject(
    pictures: str | Path,
    out: str | Path,
    *,
    prompt: str,
    class_prompt: str,
    cascade: str = "demo",
    count: int = 200,
    seed: int = 0,
    stages: int = 1,
    overwrite: bool = False,
    progress: ClassProgress = lambda what, done, total: None,
) -> tuple[int, int]:
    """Write the two folders; class pictures that are there already are kept, and only missing ones drawn.

    Args:
      pictures: folder of the subject's pictures; captions beside them are not read.
      out: gets `instance` and `class`.
      prompt: caption of all the subject's pictures, with a rare word that is to mean the subject.
      class_prompt: the same without that word.
      cascade: release folder, or "demo".
      count: pictures of the class; 0 for none, without prior preservation.
      seed: of those.
      stages: how many draw them: 1 to train stage I, 2 to train stage II.
      overwrite: replace class pictures of another prompt, cascade, seed or stage.
      progress: called before every program and at the end.

    Returns:
      Pictures of the subject, and pictures drawn now.

    Raises:
      FileNotFoundError: the folder is not there.
      ValueError: it holds no picture, a prompt is empty or both are the same, or class pictures of another kind are
        there and `overwrite` is false.
    """
    files = _pictures_in(Path(pictures))
    if not prompt.strip() or not class_prompt.strip() or prompt.strip() == class_prompt.strip():
        raise ValueError(
            f"prompt {prompt!r} and class prompt {class_prompt!r}: the first must name the subject by a word of its "
            "own, the second its class without it"
        )
    if count < 0 or stages < 1:
        raise ValueError(f"count {count}, stages {stages}: use a count of 0 or more, and 1 stage or more")
    drawn_for = {"prompt": class_prompt, "cascade": cascade, "seed": seed, "stages": stages}
    _check_class(Path(out) / "class", drawn_for, overwrite)
    instance = Path(out) / "instance"
    instance.mkdir(parents=True, exist_ok=True)
    for file in files:
        with atomic_file(instance / file.name) as beside:
            beside.write_bytes(file.read_bytes())
    _write_captions(instance, [file.name for file in files], prompt)
    return len(files), _draw_class(Path(out) / "class", drawn_for, count, progress) if count else 0


def _pictures_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give the folder of the subject's pictures")
    files = sorted(path for path in folder.iterdir() if path.is_file() and is_picture(path.name))
    if not files:
        raise ValueError(f"{folder} holds no pictures: put 3 to 20 of the subject there")
    return files


def _check_class(folder: Path, drawn_for: dict[str, Any], overwrite: bool) -> None:
    """Makes room for the class; drops the pictures of another one, if that is asked for."""
    note = folder / _NOTE
    if not folder.exists() or (note.is_file() and read_json(note) == drawn_for):
        return
    if not note.is_file():
        raise ValueError(f"{folder} exists and was not drawn here: choose another --out")
    if not overwrite:
        before = read_json(note)
        changed = next(word for word in drawn_for if before.get(word) != drawn_for[word])
        raise ValueError(
            f"{folder} holds pictures drawn for {changed} {before.get(changed)!r}, not {drawn_for[changed]!r}: choose "
            "another --out, or --overwrite"
        )
    for path in folder.glob("[0-9]*.png"):
        path.unlink()
    note.unlink()


def _draw_class(folder: Path, drawn_for: dict[str, Any], count: int, progress: ClassProgress) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / _NOTE) as beside:
        beside.write_text(json.dumps(drawn_for))
    prompt, seed, stages = str(drawn_for["prompt"]), drawn_for["seed"], drawn_for["stages"]
    names = [f"{number:04d}.png" for number in range(count)]
    missing = [number for number, name in enumerate(names) if not (folder / name).exists()]
    cascade = Cascade.load(str(drawn_for["cascade"]), stages=stages) if missing else None
    for first in range(0, count, _TILE):  # whole tiles: picture k of the seed does not depend on the others
        tile = range(first, min(first + _TILE, count))
        if cascade is None or not any(number in missing for number in tile):
            continue
        progress("class pictures", first, count)
        made = cascade.dream([prompt] * len(tile), seed=seed, first_picture=first, batch_size=_TILE)
        for number, picture in zip(tile, list(made.values())[-1], strict=True):
            if number in missing:
                with atomic_file(folder / names[number]) as beside:
                    picture.save(beside, format="PNG")
    progress("class pictures", count, count)
    _write_captions(folder, names, prompt)
    return len(missing)


def _write_captions(folder: Path, names: Sequence[str], caption: str) -> None:
    with atomic_file(folder / METADATA[0]) as beside:
        beside.write_text("".join(json.dumps({"file_name": name, "text": caption}) + "\n" for name in names))
