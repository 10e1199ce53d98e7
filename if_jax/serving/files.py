"""The PNG files of finished pictures, with all in them that it takes to draw them again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from if_jax.checkpoints.files import atomic_file
from if_jax.inference.pictures import png_bytes, with_watermark
from if_jax.serving.jobs import Job


class PictureFiles:
    """Makes them, and writes them where the server was asked to keep them."""

    def __init__(
        self, notes: dict[str, Any], *, batch_size: int, mark: Image.Image | None = None, folder: Path | None = None
    ) -> None:
        """Nothing is written yet.

        Args:
          notes: what every PNG says besides its own settings: version, cascade, precision, LoRA files.
          batch_size: of the server's programs, which decides the last bits of a picture.
          mark: laid into the corner of every picture.
          folder: where finished pictures are kept; None: nowhere.
        """
        self.notes, self._batch_size, self._mark, self._folder = notes, batch_size, mark, folder

    def png(self, job: Job, stage: str, number: int) -> bytes:
        """One picture's file.

        Args:
          job: that it is of.
          stage: that has drawn it.
          number: of the picture.
        """
        plan, picture = job.plan, job.pictures[number][stage]
        about = {**self.notes, "mode": plan.mode, "embeds": False}
        about |= {"options": {**plan.settings, "batch_size": self._batch_size}}
        about |= {"stage": stage, "picture": number, "prompt": plan.prompt}
        return png_bytes(picture if self._mark is None else with_watermark(picture, self._mark), about)

    def keep(self, job: Job) -> None:
        """Writes a finished job's pictures to FOLDER/JOB-NUMBER-STAGE.png.

        Raises:
          OSError: the disk is full, or gone.
        """
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        for number, stages in enumerate(job.pictures):
            for stage in stages:
                with atomic_file(self._folder / f"{job.id}-{number}-{stage}.png") as beside:
                    beside.write_bytes(self.png(job, stage, number))
