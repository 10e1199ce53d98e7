"""A request on its way, from the queue to its last picture."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from if_jax.serving.requests import DrawPlan


@dataclass(eq=False)
class Job:
    """A request on its way; read by any thread, changed by the engine alone.

    Attributes:
      id: that the client asks for it by.
      client: who asked: a token's name, or an address.
      plan: what is drawn.
      done: resolved with the job itself when it is finished, failed or cancelled.
      state: "queued", "drawing", "done", "failed" or "cancelled".
      error: one line, of a job that failed.
      status: the HTTP status of that.
      pictures: of each number, by the names of stages that are finished.
      progress: stage, steps taken and their total, of what is being drawn.
      previews: by number, stage and x̂0 (H, W, 3) of what is being drawn.
    """

    id: str
    client: str
    plan: DrawPlan
    done: Future[Job] = field(default_factory=Future)
    state: str = "queued"
    error: str = ""
    status: int = 200
    pictures: list[dict[str, Image.Image]] = field(default_factory=list)
    progress: tuple[str, int, int] = ("", 0, 0)
    previews: dict[int, tuple[str, np.ndarray]] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.state in ("done", "failed", "cancelled")
