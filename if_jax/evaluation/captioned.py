"""Pictures of captions against true ones, by the field's measures: what is published as FID and CLIP score of COCO.

The work is a row of chunks. A chunk's pictures are drawn, measured and forgotten (or kept); its features stay in a file
of its own. So an evaluation that was interrupted goes on, processes share it by taking every n-th chunk, each drawing
with all its devices, and the measures, computed from the chunks in order, are the same bits whoever drew them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from if_jax.checkpoints.files import atomic_file, read_json, write_json
from if_jax.evaluation import captions as caption_files
from if_jax.evaluation import draw_prompts, measures
from if_jax.evaluation.draw_prompts import LARGE_TILE, TILE, PictureProgress
from if_jax.evaluation.features import FeatureNetwork, open_network
from if_jax.evaluation.measures import Measure
from if_jax.evaluation.opening import Opening
from if_jax.evaluation.reference import Reference, pictures_sha256, read_reference, write_reference
from if_jax.evaluation.statistics import wilson
from if_jax.inference.cascade import DEMO, Cascade
from if_jax.inference.pictures import write_png
from if_jax.parallel import hosts

DEFAULT_PROMPTS = 30_000
CHUNK = 64  # pictures
_COMPARABLE = 10_000  # pictures: with fewer, FID says as much of their number
_WAIT = 300  # seconds for a process to come, or to give a sign of life
_TEXTS = "captions"  # of a chunk's arrays: CLIP's features of the captions
# What a distance of Gaussians and one of kernels are called in each network's features.
_NAMES = {
    "inception": ("fid", "kid"),
    "clip": ("fid_clip", "kid_clip"),
    "dinov2": ("fd_dinov2", "kd_dinov2"),
    "efficientnet": ("frechet", "kernel_distance"),
    "reader": ("frechet", "kernel_distance"),
}


@dataclass(frozen=True)
class CaptionedSuite:
    """What is drawn, and what it is measured with.

    Attributes:
      captions: the file, see `captions.read_captions`.
      reference: a folder of true pictures, or an .npz kept from one; None: only measures that need none.
      networks: name -> path of its weights (None for the reader), see `features.open_network`.
      count: captions asked for.
      seed: of the choice of captions and of the pictures.
      stages: draw only so many of the cascade; the last one's pictures are measured.
      reference_side: cut and scale the true pictures to so many pixels.
      share: (k, n): draw every n-th chunk only, from k on, beside n - 1 others in the same folder; None: that of this
        process among those that `hosts.connect` joined.
      keep_pictures: write the pictures too.
      opening: how the release is opened.
    """

    captions: str | Path
    reference: str | Path | None = None
    networks: Mapping[str, str | Path | None] | None = None
    count: int = DEFAULT_PROMPTS
    seed: int = 0
    stages: int | None = None
    reference_side: int | None = None
    share: tuple[int, int] | None = None
    keep_pictures: bool = False
    opening: Opening = Opening()  # noqa: RUF009 (frozen)


def evaluate(
    folder: str | Path,
    suite: CaptionedSuite,
    out: str | Path,
    *,
    options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
    progress: PictureProgress = lambda *_: None,
) -> dict[str, Any] | None:
    """Draw captions and measure the pictures; the same call goes on where one was interrupted.

    Processes that are joined call it alike, within `failures.propagated`, with an `out` that all of them see; process 0
    measures.

    Args:
      folder: of the release, or "demo".
      suite: what to draw and to measure.
      out: folder of report.json, the chunks and the kept features of the reference.
      options: what `Cascade.dream` takes besides, such as `if_I_kwargs`.
      overwrite: replace the chunks of another evaluation.
      say: is given one line for each measure that has to be left out, or that few pictures make larger.
      progress: what is being done, pictures done, of how many.

    Returns:
      The report; None where chunks of other shares are still missing.

    Raises:
      ValueError: an unknown network, captions or reference that do not fit, or `out` holds another evaluation.
      FileNotFoundError: the release, the captions, the weights or the reference are not there.
    """
    began, out = time.monotonic(), Path(out)
    folder = DEMO if str(folder) == "demo" else Path(folder)
    texts = caption_files.choose_captions(caption_files.read_captions(suite.captions), suite.count, suite.seed)
    networks = {name: open_network(name, path) for name, path in (suite.networks or {"reader": None}).items()}
    cascade = suite.opening.cascade(folder, suite.stages)
    options = {"seed": suite.seed, **(options or {})}
    identity = {
        "cascade_sha256": draw_prompts.cascade_sha256(folder),
        "prompts_sha256": caption_files.captions_sha256(texts),
        "settings": json.loads(json.dumps(options)) | {"defaults": [asdict(d) for d in cascade.defaults]},
        "stages": len(cascade.stages),
        "networks": {name: network.identity for name, network in networks.items()},
        **suite.opening.identity,
    }
    chunks = out / "pictures"
    together = jax.process_count() > 1 and suite.share is None
    number, step = suite.share or (jax.process_index(), jax.process_count())
    _claim(chunks, identity, overwrite, together)
    reads = partial(_reference, suite, networks, out, progress)
    reference = reads() if number == 0 else None  # what cannot be compared with is said before anything is drawn
    if number == 0:
        say(f"{len(texts)} captions, SHA-256 {identity['prompts_sha256'][:16]}…")
    starts = range(0, len(texts), CHUNK)
    for chunk in range(number, len(starts), step):
        progress("drawing", starts[chunk], len(texts))
        if not _chunk_file(chunks, chunk).exists():
            rows = range(starts[chunk], min(starts[chunk] + CHUNK, len(texts)))
            _draw_chunk(cascade, [texts[row] for row in rows], rows[0], networks, chunks, options, suite.keep_pictures)
    progress("drawing", len(texts), len(texts))
    _meet(together, "drawn", out)
    missing = [chunk for chunk in range(len(starts)) if not _chunk_file(chunks, chunk).exists()]
    if missing:
        say(f"{len(missing)} of {len(starts)} chunks are still to be drawn: whoever draws the last writes the report")
        return None
    if number == 0 or not together:
        reference = reference or reads()
        result = {"suite": "coco", "measures": measure(_joined(chunks, len(starts)), reference, networks, say)}
        result |= {**identity, "prompts": {"count": len(texts), "seed": suite.seed, "file": Path(suite.captions).name}}
        if reference:
            facts = {"pictures": reference.pictures, "sha256": reference.sha256, "side": suite.reference_side}
            result["reference"] = facts
        result["seconds"] = round(time.monotonic() - began)
        result["versions"] = {"jax": jax.__version__, "numpy": np.__version__}
        write_json(out / "report.json", result)
    _meet(together, "measured", out)
    return read_json(out / "report.json")


def measure(
    drawn: Mapping[str, np.ndarray],
    reference: Reference | None,
    networks: Mapping[str, FeatureNetwork],
    say: Callable[[str], None] = print,
) -> dict[str, dict[str, Any]]:
    """All measures that the pictures are enough for.

    Args:
      drawn: network -> features (N, D) of drawn pictures; "captions": CLIP's features of their captions.
      reference: features of true pictures.
      networks: that made them.
      say: is given a line for each that is left out, or that few pictures make larger.

    Returns:
      network -> measure -> {"value", "interval"}, and what it was computed with.
    """
    results: dict[str, dict[str, Any]] = {}
    for name in networks:
        rows, figures = drawn[name], {}
        if name == "clip":
            scores = measures.clip_scores(rows, drawn[_TEXTS])
            spread = 1.96 * float(scores.std(ddof=1)) / len(scores) ** 0.5 if len(scores) > 1 else 0.0
            mean = float(scores.mean())
            figures["clip_score"] = _entry(Measure(mean, (mean - spread, mean + spread)))
        if reference:
            figures |= _compared(name, rows, reference.features[name], say)
        results[name] = figures
    return results


def summary(result: Mapping[str, Any]) -> list[str]:
    """The measures of a report, a line each."""
    lines = []
    for network, figures in result["measures"].items():
        for name, entry in figures.items():
            ends = entry["interval"]
            interval = f"  ({ends[0]:.4g} … {ends[1]:.4g})" if ends else ""
            lines.append(f"{network:10} {name:16} {entry['value']:.4g}{interval}")
    return lines


def _compared(name: str, rows: np.ndarray, true: np.ndarray, say: Callable[[str], None]) -> dict[str, Any]:
    """The measures of one network against a reference."""
    figures: dict[str, Any] = {}
    frechet, kernel = _NAMES[name]
    fewest, count = min(len(rows), len(true)), len(rows)
    if fewest <= rows.shape[1]:
        say(f"{frechet} is left out: {fewest} pictures are too few for a covariance of {rows.shape[1]} features; "
            f"{kernel} still holds")  # fmt: skip
    else:
        if fewest < _COMPARABLE:
            say(f"{frechet} grows as pictures get fewer: that of {count} against {len(true)} compares with others of "
                "as many; published ones are of 10,000 to 30,000")  # fmt: skip
        of_true = measures.moments(true)
        value = measures.frechet_distance(measures.moments(rows), of_true)
        figures[frechet] = _entry(
            measures.with_interval(
                value, count, lambda some: measures.frechet_distance(measures.moments(rows[some]), of_true)
            ),
            pictures=[count, len(true)],
        )
    if fewest > 1:
        size = min(measures.KID_SUBSET_SIZE, fewest)
        mean, deviation = measures.kid(rows, true, size)
        half = 1.96 * deviation * (size / count) ** 0.5
        figures[kernel] = _entry(Measure(mean, (mean - half, mean + half)), deviation=deviation, subset_size=size)
    if fewest > measures.NEIGHBOURS:
        shares = measures.precision_recall(rows, true)
        for word, share, total in zip(("precision", "recall"), shares, (count, len(true)), strict=True):
            ends = wilson(round(share * total), total)
            figures[word] = _entry(Measure(share, (ends[0], ends[1]) if ends else None))
    if name == "clip":
        a, b = measures.normalised(rows), measures.normalised(true)
        figures["cmmd"] = _entry(
            measures.with_interval(measures.cmmd(a, b), count, lambda some: measures.cmmd(a[some], b))
        )
    return figures


def _entry(figure: Measure, **facts: Any) -> dict[str, Any]:
    return {"value": figure.value, "interval": list(figure.interval) if figure.interval else None, **facts}


def _claim(chunks: Path, identity: Mapping[str, Any], overwrite: bool, together: bool) -> None:
    """Makes the folder of the chunks ready, once for all joined processes, which must be about to do the same."""
    out = chunks.parent
    if together:
        agreed = {"out": str(out.absolute()), "code": hosts.code_hash(), **identity}
        hosts.require_same_facts(agreed, _WAIT, topic=f"evaluate {out}", while_alive=True)
    if not together or jax.process_index() == 0:
        draw_prompts.claim_folder(chunks, identity, overwrite)
    _meet(together, "begun", out)
    if together and not (chunks / "identity.json").exists():
        raise ValueError(f"{out} is not the folder that process 0 sees: give an --out that all processes see")


def _meet(together: bool, stage: str, out: Path) -> None:
    """Returns once every process has come so far; those that are alive are waited for."""
    if together:
        hosts.exchange(f"evaluate {out} {stage}", {}, _WAIT, while_alive=True)


def _draw_chunk(
    cascade: Cascade,
    texts: Sequence[str],
    first: int,
    networks: Mapping[str, FeatureNetwork],
    folder: Path,
    options: Mapping[str, Any],
    keep: bool,
) -> None:
    tile = TILE if len(cascade.stages) == 1 else LARGE_TILE
    drawn = cascade.dream(list(texts), **options, first_picture=first, batch_size=tile)
    name, pictures = list(drawn.items())[-1]
    arrays: dict[str, Any] = {network: opened.embed(pictures) for network, opened in networks.items()}
    for opened in networks.values():
        if opened.embed_texts:
            arrays[_TEXTS] = opened.embed_texts(texts)
    if keep:
        for row, picture in enumerate(pictures):
            write_png(folder / f"{first + row:05d}-{name}.png", picture, {"prompt": texts[row]})
    with atomic_file(_chunk_file(folder, first // CHUNK)) as beside, open(beside, "wb") as file:
        np.savez(file, **arrays)


def _joined(folder: Path, chunks: int) -> dict[str, np.ndarray]:
    parts = []
    for number in range(chunks):
        with np.load(_chunk_file(folder, number), allow_pickle=False) as arrays:
            parts.append({name: arrays[name] for name in arrays.files})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _reference(
    suite: CaptionedSuite, networks: Mapping[str, FeatureNetwork], out: Path, progress: PictureProgress
) -> Reference | None:
    """The features of the true pictures: those that `out` keeps already, where the pictures are the same."""
    if suite.reference is None:
        return None
    kept, side = out / "reference.npz", suite.reference_side
    if not Path(suite.reference).is_dir():
        return read_reference(suite.reference, networks, side)
    if kept.is_file():
        with suppress(ValueError):  # of another network, another size, or damaged
            before = read_reference(kept, networks, side)
            if before.sha256 == pictures_sha256(suite.reference):
                return before
    measured = read_reference(suite.reference, networks, side, lambda done, total: progress("reference", done, total))
    write_reference(kept, measured, networks, side)
    return measured


def _chunk_file(folder: Path, number: int) -> Path:
    return folder / draw_prompts.FEATURES.format(number)
