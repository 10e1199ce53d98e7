"""SynthEval: draw prompts whose truth is known, read what was drawn, and make one report of it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from if_jax.checkpoints.files import write_json
from if_jax.diffusion import augment
from if_jax.evaluation import draw_prompts, fixed_timestep_loss
from if_jax.evaluation.draw_prompts import PictureProgress
from if_jax.evaluation.opening import Opening
from if_jax.evaluation.statistics import kernel_distance, psnr
from if_jax.evaluation.synth import eval_prompts, ocr, reading, report, scoring
from if_jax.evaluation.synth.eval_prompts import OBJECT_SKILLS, EvalPrompt
from if_jax.inference.cascade import DEMO, Cascade
from if_jax.inference.pictures import to_pil
from if_jax.scenes import raycast
from if_jax.scenes.scene import Scene

DEFAULT_PROMPTS = 420
_BLUR = 3.0  # px of 64
_LOSS_PICTURES = {"I": 32, "II": 8}
_ENLARGED = 16  # true low-resolution pictures that stage II enlarges, at most; a tenth of few prompts


class Truth(NamedTuple):
    """True renders of the prompts."""

    scenes: Scene
    small: np.ndarray  # (B, 64, 64, 3) in [-1, 1]


class Drawing(NamedTuple):
    """What draws the prompts of one evaluation, and where to."""

    cascade: Cascade
    folder: Path
    options: Mapping[str, Any]
    progress: PictureProgress

    def stage_two(self, captions: Mapping[int, str], low: Sequence[Image.Image], name: str = "II") -> list[Image.Image]:
        """`draw_prompts.stage_two`."""
        return draw_prompts.stage_two(self.cascade, captions, low, self.folder, self.options, self.progress, name)


def evaluate(
    folder: str | Path,
    out: str | Path,
    *,
    count: int = DEFAULT_PROMPTS,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    opening: Opening = Opening(),  # noqa: B008 (frozen)
    overwrite: bool = False,
    say: Callable[[str], None] = print,
    progress: PictureProgress = lambda *_: None,
) -> dict[str, Any]:
    """Score a release; the same call goes on where one was interrupted.

    Args:
      folder: of the release, or "demo".
      out: folder that gets report.json, report.html, sheet.png and the pictures.
      count: prompts.
      seed: of prompts and pictures.
      options: what `Cascade.dream` takes besides, such as `if_I_kwargs`.
      opening: how the release is opened.
      overwrite: replace the pictures of another evaluation.
      say: is given one line for each score that has to be left out.
      progress: what is being drawn, pictures done, of how many.

    Returns:
      The report.

    Raises:
      ValueError: too few prompts, or `out` holds another evaluation.
      FileNotFoundError: the release lacks something.
    """
    began, out = time.monotonic(), Path(out)
    folder = DEMO if str(folder) == "demo" else Path(folder)
    cascade = opening.cascade(folder)
    if (options or {}).get("if_II_kwargs") and len(cascade.stages) < 2:
        raise ValueError(f"if_II_kwargs is given, but {folder} has stage I alone: leave the options of stage II out")
    prompts, true_scenes = eval_prompts.sample_prompts(count, seed)
    options = {"seed": seed, **(options or {})}
    identity: dict[str, Any] = {
        "cascade_sha256": draw_prompts.cascade_sha256(folder),
        "prompts_sha256": eval_prompts.sha256(prompts),
        "settings": json.loads(json.dumps(options)) | {"defaults": [asdict(d) for d in cascade.defaults]},
        **opening.identity,
    }
    drawing = Drawing(cascade, out / "pictures", options, progress)
    draw_prompts.claim_folder(drawing.folder, identity, overwrite)
    head = {"prompts": {"count": count, "seed": seed}, **identity}
    scores, rows = _draw_and_score(drawing, prompts, Truth(true_scenes, render(true_scenes, reading.PIXELS)), head, say)
    result = {"suite": "synth", **scores, "seconds": round(time.monotonic() - began)}
    result["versions"] = {"jax": jax.__version__, "numpy": np.__version__}
    write_json(out / "report.json", result)
    report.write(out / "report.html", result, rows)
    report.sheet(rows).save(out / "sheet.png")
    return result


def summary(result: Mapping[str, Any]) -> list[str]:
    """The scores of a report in a few lines."""

    def line(name: str) -> str:
        value, interval = result[name], result[f"{name}_ci"]
        text = "not measured" if value is None else f"{value:.3f}  ({interval[0]:.3f} … {interval[1]:.3f})"
        return f"{name.replace('_', ' '):12} {text}"

    known = {name: scores["overall"] for name, scores in result["calibration"].items()}
    gap = result["unseen"]["gap"]
    return [
        *map(line, ("overall", *OBJECT_SKILLS, "words_exact")),
        "overall of true renders {true:.3f}, blurred {blurred:.3f}, shuffled {shuffled:.3f}".format(**known),
        f"unseen combinations {result['unseen']['overall']:.3f}" + ("" if gap is None else f", gap {gap:+.3f}"),
    ]


def calibrate(prompts: Sequence[EvalPrompt], truth: Truth) -> dict[str, Any]:
    """What pictures of known worth score: true renders, the same blurred, and true renders of other captions.

    A caption's picture is taken from the next one of its task, so `shuffled` is what a drawing earns that knows the
    task but not the prompt.

    Args:
      prompts: what was to be drawn.
      truth: true renders of them.

    Returns:
      The scores without intervals of "true", "blurred" and "shuffled".
    """
    blurred = np.asarray(augment.blur(jnp.asarray(truth.small), jnp.full(len(prompts), _BLUR), _BLUR))
    true, soft = reading.read(truth.small), reading.read(blurred)
    order = np.arange(len(prompts))
    for skill in eval_prompts.SKILLS:
        of_skill = np.flatnonzero([prompt.skill == skill for prompt in prompts])
        order[of_skill] = np.roll(of_skill, 1)
    sets = {"true": true, "blurred": soft, "shuffled": [true[i] for i in order]}
    everyone = [prompt._replace(unseen=False) for prompt in prompts]
    scores = {name: scoring.score_objects(everyone, objects) for name, objects in sets.items()}
    return {name: scoring.without_intervals(of_set) for name, of_set in scores.items()}


def render(batch: Scene, size: int, rows: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
    """True pictures of scenes.

    They are drawn so many at a time, and small ones averaged from 64 px, so that few programs serve all.

    Args:
      batch: scenes on the host, every field with a leading B.
      size: side of the pictures in pixels.
      rows: which of the scenes; all unless given.

    Returns:
      (B or rows, size, size, 3) float32 in [-1, 1].
    """
    chosen = np.arange(len(batch.valid)) if rows is None else np.asarray(rows)
    tile, parts = 32 if size <= reading.PIXELS else 4, []
    for start in range(0, len(chosen), tile):
        full = chosen[np.minimum(np.arange(start, start + tile), len(chosen) - 1)]
        part = jax.tree.map(lambda field, full=full: field[full], batch)
        picture = raycast.render_scenes(part, max(size, reading.PIXELS)).astype(jnp.float32) / 127.5 - 1
        parts.append(np.asarray(picture if size >= reading.PIXELS else augment.downsample(picture, size)))
    return np.concatenate(parts)[: len(chosen)]


def _draw_and_score(
    drawing: Drawing,
    prompts: Sequence[EvalPrompt],
    truth: Truth,
    head: Mapping[str, Any],
    say: Callable[[str], None],
) -> tuple[dict[str, Any], list[report.RatedPicture]]:
    """All scores, with `head` behind those of the objects, and what the page shows."""
    captions = [prompt.caption for prompt in prompts]
    first = draw_prompts.stage_one(drawing.cascade, captions, drawing.folder, drawing.options, drawing.progress)
    small = reading.to_array(first)
    objects = reading.read(small)
    scores: dict[str, Any] = {**scoring.score_objects(prompts, objects), **head}
    scores["pictures_sha256"] = hashlib.sha256(small.tobytes()).hexdigest()
    scores |= {"reader": reading.read_notes(), "calibration": calibrate(prompts, truth)}
    scores["kernel_distance"] = _distances(small, truth.small)
    second, of_second = _later_stage(drawing, prompts, first, truth, say)
    scores |= of_second | {"loss": _losses(drawing, prompts, truth)}
    rows = zip(prompts, first, objects, strict=True)
    return scores, [report.RatedPicture(*row, second.get(i)) for i, row in enumerate(rows)]


def _distances(small: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Kernel distance to true renders: of the drawings, of half of the renders to the others, of blurred ones."""
    reference = reading.features(true)
    blurred = np.asarray(augment.blur(jnp.asarray(true), jnp.full(len(true), 1.0), 1.0))
    rows = {"drawn": (reading.features(small), reference), "true": (reference[::2], reference[1::2])}
    rows["blurred"] = reading.features(blurred), reference
    return {name: round(kernel_distance(a, b, reference), 5) for name, (a, b) in rows.items()}


def _later_stage(
    drawing: Drawing,
    prompts: Sequence[EvalPrompt],
    first: Sequence[Image.Image],
    truth: Truth,
    say: Callable[[str], None],
) -> tuple[dict[int, Image.Image], dict[str, Any]]:
    """Stage II's pictures of the words' prompts, by number, and the scores of words and of super-resolution."""
    chosen = {i: prompt.caption for i, prompt in enumerate(prompts) if prompt.skill == "words"}
    low = [first[i] for i in chosen]
    readers = ocr.readers(say)
    if len(drawing.cascade.stages) < 2:
        say("the cascade has one stage: words are read from its pictures enlarged, super-resolution is not scored")
        return {}, _words(readers, prompts, {"drawn": dict(zip(chosen, low, strict=True))})
    size = drawing.cascade.stages[1].unet_config.sample_size
    second = drawing.stage_two(chosen, low)
    true = render(truth.scenes, size, list(chosen))
    bicubic = _enlarge(low, size)
    sets = {"drawn": second, "bicubic": bicubic, "true": [to_pil(picture) for picture in true]}
    words = _words(readers, prompts, {name: dict(zip(chosen, rows, strict=True)) for name, rows in sets.items()})
    reference = reading.features(true)
    distance: dict[str, float | None] = {
        name: round(kernel_distance(reading.features(reading.to_array(rows, size)), reference), 5)
        for name, rows in {"drawn": second, "bicubic": bicubic}.items()
    }
    enough = len(reference) > 3  # for two halves
    distance["true"] = round(kernel_distance(reference[::2], reference[1::2], reference), 5) if enough else None
    few = dict(list(chosen.items())[: min(_ENLARGED, max(2, len(prompts) // 10))])
    scores = {
        "kernel_distance": distance,
        "objects_right": {
            name: _objects_right([prompts[i] for i in chosen], rows) for name, rows in {"I": low, "II": second}.items()
        },
        "psnr": _psnr(drawing, few, true[: len(few)]),
    }
    return dict(zip(chosen, second, strict=True)), words | {"super_resolution": scores}


def _psnr(drawing: Drawing, chosen: Mapping[int, str], true: np.ndarray) -> dict[str, Any]:
    """Mean PSNR in dB of true low-resolution pictures enlarged: by bicubic, by stage II at level 0 and as it draws."""
    size, before = true.shape[1], drawing.cascade.stages[0].unet_config.sample_size
    low = [to_pil(picture) for picture in np.asarray(augment.downsample(jnp.asarray(true), before))]
    default = dict(drawing.options.get("if_II_kwargs") or {})
    level_0 = {word: value for word, value in default.items() if word != "aug_level"} | {"noise_level": 0}
    sets = {"bicubic": _enlarge(low, size)}
    for name, settings in (("level_0", level_0), ("default", default)):
        options = {**drawing.options, "if_II_kwargs": settings} if settings else drawing.options
        sets[name] = drawing._replace(options=options).stage_two(chosen, low, f"true-{name}")
    means = {}
    for name, rows in sets.items():
        values = [psnr(a, b) for a, b in zip(reading.to_array(rows, size), true, strict=True)]
        means[name] = round(float(np.mean(values)), 3)
    return means | {"pictures": len(true)}


def _enlarge(pictures: Sequence[Image.Image], size: int) -> list[Image.Image]:
    return [picture.resize((size, size), Image.Resampling.BICUBIC) for picture in pictures]


def _objects_right(prompts: Sequence[EvalPrompt], pictures: Sequence[Image.Image]) -> float:
    """The share of words' prompts whose objects are right, at 64 px: what stage II keeps of stage I."""
    objects = reading.read(reading.to_array(pictures))
    return round(float(np.mean([scoring.is_right(*pair) for pair in zip(prompts, objects, strict=True)])), 4)


def _words(
    readers: Mapping[str, ocr.OcrReader],
    prompts: Sequence[EvalPrompt],
    sets: Mapping[str, Mapping[int, Image.Image]],
) -> dict[str, Any]:
    """`words_exact` as RapidOCR reads the drawings, and each reader's scores of each set of pictures."""
    scores: dict[str, Any] = {}
    for reader, read in readers.items():
        for name, pictures in sets.items():
            texts = dict(zip(pictures, ocr.read_words(read, list(pictures.values())), strict=True))
            splits = {"": False, "_unseen": True} if name == "drawn" else {"": None}
            for split, unseen in splits.items():
                rows = [i for i in texts if unseen is None or prompts[i].unseen == unseen]
                of_split = scoring.word_scores([prompts[i].word for i in rows], [texts[i] for i in rows])
                scores.setdefault(reader, {})[name + split] = of_split
    main = scores.get("rapidocr", {}).get("drawn", {})
    return {"words_exact": main.get("exact"), "words_exact_ci": main.get("exact_ci"), "words": scores}


def _losses(drawing: Drawing, prompts: Sequence[EvalPrompt], truth: Truth) -> dict[str, Any]:
    """The fixed-timestep loss of each stage on true renders, spread over the tasks."""
    losses = {}
    for stage, (name, count) in zip(drawing.cascade.stages, _LOSS_PICTURES.items(), strict=False):
        drawing.progress(f"loss of stage {name}", 0, 1)
        rows = np.unique(np.linspace(0, len(prompts) - 1, count).astype(int))
        true = render(truth.scenes, stage.unet_config.sample_size, rows)
        captions = [prompts[i].caption for i in rows]
        losses[name] = fixed_timestep_loss.losses(drawing.cascade, name, true, captions)
        drawing.progress(f"loss of stage {name}", 1, 1)
    return losses
