"""A setting swept: the same captions drawn at each of its values, and the curve of the measures."""

from __future__ import annotations

import html
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from if_jax.checkpoints.files import atomic_file, write_json
from if_jax.evaluation import captioned
from if_jax.evaluation.captioned import CaptionedSuite
from if_jax.evaluation.draw_prompts import PictureProgress

SweptReport = tuple[str, Mapping[str, Any]]  # value of the setting, its report


def sweep(
    folder: str | Path,
    suite: CaptionedSuite,
    out: str | Path,
    word: str,
    settings: Mapping[str, Mapping[str, Any]],
    *,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
    progress: PictureProgress = lambda *_: None,
) -> list[SweptReport] | None:
    """Evaluate a release at each value of a setting, in OUT/WORD-VALUE, and draw OUT/curve.png, .html and .json.

    The reference is measured once. The same call goes on where one was interrupted.

    Args:
      folder: of the release, or "demo".
      suite: what to draw and to measure.
      out: folder.
      word: what is swept, for names and axes.
      settings: value of the setting -> what `Cascade.dream` takes for it.
      overwrite: replace what other evaluations left there.
      say: is given a line where something is left out.
      progress: what is being done, pictures done, of how many.

    Returns:
      Value and report in turn; None where chunks of other processes are still missing.

    Raises:
      ValueError: matplotlib is not installed, or as for `captioned.evaluate`.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("a curve is drawn by matplotlib, which is not installed: pip install matplotlib")
    out, rows = Path(out), []
    for value, options in settings.items():
        place = out / f"{word}-{value}"
        say(f"{word} {value}")
        report = captioned.evaluate(
            folder, suite, place, options=options, overwrite=overwrite, say=say, progress=progress
        )
        if report is None:
            return None
        rows.append((value, report))
        if (kept := place / "reference.npz").exists():
            suite = replace(suite, reference=kept)
    write_json(out / "curve.json", {"word": word, "rows": [{"value": value, **report} for value, report in rows]})
    draw(out, word, rows)
    return rows


def draw(out: Path, word: str, rows: Sequence[SweptReport]) -> None:
    """Write OUT/curve.png and OUT/curve.html: each measure by the setting, and FID by CLIP score where both are there.

    Args:
      out: folder.
      word: what was swept.
      rows: value and report in turn.
    """
    from matplotlib.figure import Figure

    series = {
        (network, name): [report["measures"][network].get(name) for _, report in rows]
        for network, figures in rows[0][1]["measures"].items()
        for name in figures
    }
    series = {key: entries for key, entries in series.items() if all(entries)}
    distances = [key for key in series if key[1].startswith(("fid", "fd_", "frechet"))]
    scores = [key for key in series if key[1] == "clip_score"]
    plots = [(None, key) for key in series] + [(score, distance) for score in scores for distance in distances]
    columns = min(3, len(plots))
    lines = -(-len(plots) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * lines), layout="constrained")
    values = [value for value, _ in rows]
    for i, (across, key) in enumerate(plots):
        axes = figure.add_subplot(lines, columns, i + 1)
        up = [entry["value"] for entry in series[key]]
        right = range(len(values)) if across is None else [entry["value"] for entry in series[across]]
        axes.plot(right, up, "o-", color="#1f5fa8", markersize=4)
        if across is None:
            ends = [entry["interval"] or (entry["value"],) * 2 for entry in series[key]]
            low, high = zip(*ends, strict=True)
            axes.fill_between(right, low, high, alpha=0.15, color="#1f5fa8", linewidth=0)
            axes.set_xticks(range(len(values)), values)
            axes.set_xlabel(word)
        else:
            for x, y, value in zip(right, up, values, strict=True):
                axes.annotate(value, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
            axes.set_xlabel(" ".join(across))
        axes.set_ylabel(" ".join(key))
        axes.grid(alpha=0.3)
    with atomic_file(out / "curve.png") as beside:
        figure.savefig(beside, format="png", dpi=120)
    head = "".join(f"<th>{html.escape(' '.join(key))}</th>" for key in series)
    body = "".join(
        f"<tr><td>{html.escape(value)}</td>"
        + "".join(f"<td>{report['measures'][network][name]['value']:.4g}</td>" for network, name in series)
        + "</tr>"
        for value, report in rows
    )
    page = (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(word)}</title>"
        "<style>body{font:15px sans-serif;margin:2em auto;max-width:70em}img{max-width:100%}"
        "td,th{padding:.3em .8em;text-align:right;border-bottom:1px solid #ccc}</style>"
        f"<h1>By {html.escape(word)}</h1><img src=curve.png alt='curves'>"
        f"<table><tr><th>{html.escape(word)}</th>{head}</tr>{body}</table>"
    )
    with atomic_file(out / "curve.html") as beside:
        beside.write_text(page, encoding="utf-8")
