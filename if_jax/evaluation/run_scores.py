"""A run scored while it trains: checkpoints that appear are published beside the scores, drawn from and measured."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from if_jax.checkpoints import run
from if_jax.config import to_recipe
from if_jax.evaluation import captioned
from if_jax.evaluation.captioned import CaptionedSuite
from if_jax.evaluation.draw_prompts import PictureProgress
from if_jax.parallel import run_lock
from if_jax.tracking.writer import MetricWriter
from if_jax.training.publish import publish

NAME = "evaluation"  # of the lines: WORKDIR/evaluation.jsonl
_POLL_SECONDS = 20.0


def watch(
    workdir: str,
    suite: CaptionedSuite,
    out: str | Path,
    *,
    every: int = 1,
    options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
    progress: PictureProgress = lambda *_: None,
    poll_seconds: float = _POLL_SECONDS,
) -> list[tuple[int, Mapping[str, Any]]]:
    """Score the checkpoints of a run as they appear, until the run ends.

    Of several that have appeared meanwhile the newest is scored. The same call goes on where one was interrupted.

    Args:
      workdir: of a run that trains a base stage; a local path or gs://….
      suite: what to draw and to measure.
      out: folder; OUT/step-N has the report of step N.
      every: steps between two scores, at least; the last checkpoint is scored in any case.
      options: what `Cascade.dream` takes besides.
      overwrite: replace the chunks of another evaluation.
      say: is given a line for each checkpoint, and where something is left out.
      progress: what is being done, pictures done, of how many.
      poll_seconds: between two looks at the run.

    Returns:
      Step and report of each checkpoint that was scored.

    Raises:
      FileNotFoundError: there is no run, and nobody is beginning one.
      ValueError: the run trains a later stage; or as for `captioned.evaluate`.
    """
    out, scored = Path(out), []
    last = max(_reported(out), default=0)
    while True:
        at_work = run_lock.is_at_work(workdir)
        step, metadata = run.read_latest(workdir)
        if not metadata and not at_work:
            raise FileNotFoundError(
                f"no checkpoint under {workdir}, and no run is at work there: give a run's --workdir"
            )
        if metadata:
            recipe = to_recipe(metadata["recipe"])
            if recipe.stage != "base":
                raise ValueError(
                    f"{workdir} trains a {recipe.stage} stage, which draws nothing by itself: name stage I"
                )
            ended = not at_work or step >= recipe.steps
            if step > last and (step >= last + every or ended):
                last, report = _score(workdir, suite, out, options, overwrite, say, progress)
                scored.append((last, report))
                _write(workdir, last, report, metadata)
                if (kept := out / f"step-{last}" / "reference.npz").exists():
                    suite = replace(suite, reference=kept)
                continue  # another may have appeared meanwhile
            if ended:
                why = "is trained to its end" if step >= recipe.steps else "is not trained any more"
                say(f"{workdir} {why}, at step {step}")
                return scored
        _wait(poll_seconds)


def _wait(seconds: float) -> None:
    time.sleep(seconds)


def _score(
    workdir: str,
    suite: CaptionedSuite,
    out: Path,
    options: Mapping[str, Any] | None,
    overwrite: bool,
    say: Callable[[str], None],
    progress: PictureProgress,
) -> tuple[int, Mapping[str, Any]]:
    """Publishes the newest checkpoint, and scores it."""
    release = out / "cascade"
    out.mkdir(parents=True, exist_ok=True)
    publish([workdir], str(release), overwrite=True)
    step = int(_step_of(release))
    place = out / f"step-{step}"
    say(f"step {step}")
    report = captioned.evaluate(release, suite, place, options=options, overwrite=overwrite, say=say, progress=progress)
    shutil.rmtree(release)
    if report is None:
        raise ValueError(f"{place} is shared with other processes: a run is watched by one")
    return step, report


def _step_of(release: Path) -> str:
    from if_jax.checkpoints.release import read_stage

    return read_stage(release / "stage_I", None).notes["step"]


def _write(workdir: str, step: int, report: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """The measures to WORKDIR/evaluation.jsonl, TensorBoard and (where the run uses it) Weights & Biases."""
    values = {
        f"{NAME}/{network}/{measure}": entry["value"]
        for network, figures in report["measures"].items()
        for measure, entry in figures.items()
    }
    rows = [
        (step, network, measure, entry["value"], *(entry["interval"] or (None, None)))
        for network, figures in report["measures"].items()
        for measure, entry in figures.items()
    ]
    with closing(MetricWriter(workdir, step, metadata["recipe"]["wandb"], metadata["recipe"], name=NAME)) as writer:
        writer.scalars(step, values)
        writer.table(step, f"{NAME}_table", ("step", "network", "measure", "value", "low", "high"), rows)
        writer.flush()


def _reported(out: Path) -> list[int]:
    """Steps whose report is there."""
    reports = (path for path in out.glob("step-*/report.json") if path.parent.name[5:].isdigit())
    return [int(path.parent.name[5:]) for path in reports if json.loads(path.read_text()).get("measures") is not None]
