"""One writer for a run's numbers and pictures: JSON lines, TensorBoard, Weights & Biases; on process 0."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from if_jax.tracking.mirror import Mirror

_LINES, _WANDB_ID = "metrics.jsonl", "wandb_id"


class MetricWriter:
    """Writes `WORKDIR/metrics.jsonl`, `tensorboard/`, `samples/` and, with a project, to Weights & Biases.

    Silent on other processes than 0. A run that resumes at `start_step` first drops the lines written after it: they
    are about to be written again. With WANDB_MODE=offline everything for Weights & Biases stays in `WORKDIR/wandb`.
    A WORKDIR like gs://… gets copies of local files: once a minute, and at every `flush`.
    """

    def __init__(
        self,
        workdir: str,
        start_step: int,
        wandb_project: str = "",
        recipe: Mapping[str, Any] | None = None,
        *,
        name: str = "",
    ) -> None:
        """Opens all of them.

        Args:
          workdir: folder of the run, a local path or gs://….
          start_step: the step to go on from.
          wandb_project: project at Weights & Biases; "": nothing is sent there.
          recipe: as plain values, for Weights & Biases.
          name: of another kind of lines, which are written beside those of training, also while that goes on: they go
            to WORKDIR/NAME.jsonl, and to a run of its own at Weights & Biases.

        Raises:
          ValueError: a project is named, but wandb is not installed.
        """
        self._active = jax.process_index() == 0
        if not self._active:
            return
        from tensorboardX import SummaryWriter

        self._mirror = Mirror(workdir) if "://" in workdir else None
        self._root = self._mirror.local if self._mirror else Path(workdir)
        self._root.mkdir(parents=True, exist_ok=True)
        lines, note = (f"{name}.jsonl", f"{_WANDB_ID}_{name}") if name else (_LINES, _WANDB_ID)
        if self._mirror:
            self._mirror.fetch(lines)
            self._mirror.fetch(note)
        # First, since it may refuse: nothing else is open then.
        self._wandb = _open_wandb(self._root / note, wandb_project, recipe) if wandb_project else None
        path = self._root / lines
        _drop_lines_after(path, start_step)
        self._lines = path.open("a", buffering=1)
        self._board = SummaryWriter(
            str(self._root / "tensorboard"),
            purge_step=None if name else start_step + 1,
            filename_suffix=f".{name or start_step}",
        )
        self.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line; floats are written with all their digits, so that two runs can be compared bit for bit."""
        if not self._active:
            return
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)
        if self._mirror:
            self._mirror.push_sometimes()

    def names(self, step: int, kind: str, names: list[str]) -> None:
        """Appends a line of names.

        Args:
          step: they belong to.
          kind: the line's key.
          names: of records, say.
        """
        if self._active:
            self._lines.write(json.dumps({"step": step, kind: names}) + "\n")
            self._board.add_text(kind, ", ".join(names), step)

    def pictures(self, step: int, name: str, sheet: Image.Image, single: Mapping[str, Image.Image]) -> None:
        """Saves a sheet of pictures as `samples/NAME-STEP.png` and to TensorBoard.

        Weights & Biases gets the single ones as a table of this step's rows, so that nothing is sent twice and a
        resumed run forgets none; `runs.history.concat["NAME_table"]` shows every prompt over time.

        Args:
          step: when they were drawn.
          name: of the sheet.
          sheet: all of them in a grid.
          single: each by its prompt.
        """
        if not self._active:
            return
        folder = self._root / "samples"
        folder.mkdir(exist_ok=True)
        sheet.save(folder / f"{name}-{step:07d}.png")
        self._board.add_image(name, np.asarray(sheet), step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            rows: list[Any] = [[step, prompt, wandb.Image(picture)] for prompt, picture in single.items()]
            table = wandb.Table(columns=["step", "prompt", "picture"], data=rows)
            self._wandb.log({name: wandb.Image(sheet), f"{name}_table": table}, step=step)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Sends a table to Weights & Biases, where the run uses it.

        Args:
          step: it belongs to.
          name: of the table.
          columns: their names.
          rows: their values.
        """
        if self._active and self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Table(columns=[*columns], data=[[*row] for row in rows])}, step=step)

    def flush(self) -> None:
        """Has everything where it outlives this machine."""
        if self._active and self._mirror:
            self._board.flush()
            self._mirror.push()

    def close(self) -> None:
        """Flushes and closes everything."""
        if self._active:
            self._lines.close()
            self._board.close()
            if self._wandb is not None:
                self._wandb.finish()
            if self._mirror:
                self._mirror.close()


def _open_wandb(note: Path, project: str, recipe: Mapping[str, Any] | None) -> Any:
    """One Weights & Biases run for a work folder, however often training is resumed: its id is kept in a note there."""
    root = note.parent
    try:
        import wandb
    except ImportError:
        raise ValueError(f"recipe key wandb is {project!r}, but wandb is not installed: pip install wandb") from None
    os.environ.setdefault("WANDB_DATA_DIR", str(root / "wandb"))  # where tables wait to be sent, with their pictures
    if not note.exists():
        note.write_text(secrets.token_hex(4))
    return wandb.init(project=project, dir=str(root), id=note.read_text(), resume="allow", config=dict(recipe or {}))


def _drop_lines_after(path: Path, step: int) -> None:
    """Keeps the lines up to `step`; a last line that a kill cut short is dropped as well."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue
    beside = path.with_suffix(".partial")
    beside.write_text("".join(kept))
    os.replace(beside, path)
