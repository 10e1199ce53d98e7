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
from if_jax.evaluation.draw_prompts import Progress
from if_jax.evaluation.synth import eval_prompts, ocr, reading, report, scoring
from if_jax.evaluation.synth.eval_prompts import OBJECT_SKILLS, EvalPrompt
from if_jax.evaluation.synth.reading import Seen
from if_jax.inference.cascade import DEMO, Cascade
from if_jax.inference.pictures import to_pil
from if_jax.scenes import raycast
from if_jax.scenes.scene import Scene

SUITES = ("synth",)
DEFAULT_PROMPTS = 420
_BLUR = 3.0  # px of 64
_LOSS_PICTURES = {"I": 32, "II": 8}
_ENLARGED = 16  # true low-resolution pictures that stage II is given, at most; a tenth of few prompts


class Truth(NamedTuple):
    """True renders of the prompts."""

    scenes: Scene
    small: np.ndarray  # (B, 64, 64, 3) in [-1, 1]


def evaluate(
    folder: str | Path,
    suite: str,
    out: str | Path,
    *,
    prompts: int = DEFAULT_PROMPTS,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Score a release; writes OUT/report.json, OUT/report.html, OUT/sheet.png and the pictures, and returns the report.

    options: what `Cascade.dream` takes besides, such as `if_I_kwargs`. The same call goes on where one was interrupted.
    Raises ValueError for an unknown suite or too few prompts, FileNotFoundError where the release lacks something.
    """
    if suite not in SUITES:
        raise ValueError(f"suite {suite!r} is unknown: use one of {', '.join(SUITES)}")
    began = time.monotonic()
    folder = DEMO if str(folder) == "demo" else Path(folder)
    cascade = Cascade.load(folder)
    asks, true_scenes = eval_prompts.prompts(prompts, seed)
    options = {"seed": seed, **(options or {})}
    identity = {"cascade_sha256": draw_prompts.cascade_sha256(folder), "prompts_sha256": eval_prompts.sha256(asks)}
    identity["settings"] = json.loads(json.dumps(options)) | {"defaults": [asdict(d) for d in cascade.defaults]}
    pictures = Path(out) / "pictures"
    draw_prompts.prepare(pictures, identity, overwrite)
    truth = Truth(true_scenes, render(true_scenes, reading.PIXELS))

    captions = [one.caption for one in asks]
    first = draw_prompts.stage_one(cascade, captions, pictures, options, progress)
    small = reading.to_array(first)
    seen = reading.read(small)
    scores = score_objects(asks, seen)
    result = {"suite": suite, **scores, "prompts": {"count": len(asks), "seed": seed}} | identity
    result["pictures_sha256"] = hashlib.sha256(small.tobytes()).hexdigest()
    result |= {"reader": reading.about(), "calibration": calibrate(asks, truth)}
    result["kernel_distance"] = _distances(small, truth.small)
    second, of_second = _later_stage(cascade, asks, first, truth, pictures, options, say, progress)
    result |= of_second
    result["loss"] = _losses(cascade, asks, truth, progress)
    result["seconds"] = round(time.monotonic() - began)
    result["versions"] = {"jax": jax.__version__, "numpy": np.__version__}
    out = Path(out)
    write_json(out / "report.json", result)
    report.write(out / "report.html", result, asks, first, seen, second)
    report.sheet(asks, first, seen).save(out / "sheet.png")
    return result


def summary(result: Mapping[str, Any]) -> list[str]:
    """The scores in a few lines."""

    def line(name: str, source: Mapping[str, Any]) -> str:
        interval = source[f"{name}_ci"]
        told = (
            "not measured" if source[name] is None else f"{source[name]:.3f}  ({interval[0]:.3f} … {interval[1]:.3f})"
        )
        return f"{name.replace('_', ' '):12} {told}"

    lines = [line(name, result) for name in ("overall", *OBJECT_SKILLS, "words_exact")]
    known = result["calibration"]
    lines.append(
        "overall of true renders {true:.3f}, blurred {blurred:.3f}, shuffled {shuffled:.3f}".format(
            **{name: scores["overall"] for name, scores in known.items()}
        )
    )
    gap = result["unseen"]["gap"]
    return [
        *lines,
        f"unseen combinations {result['unseen']['overall']:.3f}" + ("" if gap is None else f", gap {gap:+.3f}"),
    ]


def score_objects(asks: Sequence[EvalPrompt], seen: Sequence[Sequence[Seen]]) -> dict[str, Any]:
    """The six tasks over known combinations, the same apart over unseen ones, and by the loose rule."""
    hits = [scoring.right(one, objects) for one, objects in zip(asks, seen, strict=True)]
    loose = [scoring.right(one, objects, loose=True) for one, objects in zip(asks, seen, strict=True)]
    parts = {}
    for name, found, unseen in (("known", hits, False), ("loose", loose, False), ("unseen", hits, True)):
        chosen = [(one, hit) for one, hit in zip(asks, found, strict=True) if one.unseen == unseen]
        parts[name] = scoring.skill_scores([one for one, _ in chosen], [hit for _, hit in chosen])
    names = ("overall", *OBJECT_SKILLS)
    unseen = parts["unseen"] | {"gap": scoring.unseen_gap(asks, hits)}
    return parts["known"] | {"unseen": unseen, "loose": scoring.flat(parts["loose"], names)}


def calibrate(asks: Sequence[EvalPrompt], truth: Truth) -> dict[str, Any]:
    """What pictures of known worth score: true renders, the same blurred, and true renders of other captions.

    A caption's place is taken by the next one of its task, so `shuffled` is what a drawing earns that knows the task
    but not the prompt.
    """
    blurred = np.asarray(augment.blur(jnp.asarray(truth.small), jnp.full(len(asks), _BLUR), _BLUR))
    true, soft = reading.read(truth.small), reading.read(blurred)
    order = np.arange(len(asks))
    for skill in eval_prompts.SKILLS:
        of_skill = np.flatnonzero([one.skill == skill for one in asks])
        order[of_skill] = np.roll(of_skill, 1)
    names = ("overall", *OBJECT_SKILLS)
    rows = {"true": true, "blurred": soft, "shuffled": [true[i] for i in order]}
    everyone = [one._replace(unseen=False) for one in asks]
    return {name: scoring.flat(score_objects(everyone, found), names) for name, found in rows.items()}


def render(batch: Scene, size: int, rows: Sequence[int] | None = None) -> np.ndarray:
    """True pictures (B, size, size, 3) in [-1, 1] of scenes, or of some `rows` of them.

    They are drawn so many at a time, and small ones averaged from 64 px, so that few programs serve all.
    """
    rows = np.arange(len(batch.valid)) if rows is None else np.asarray(rows)
    tile, parts = 32 if size <= reading.PIXELS else 4, []
    for start in range(0, len(rows), tile):
        chosen = rows[np.minimum(np.arange(start, start + tile), len(rows) - 1)]
        part = Scene(*(field[chosen] for field in batch))
        drawing = raycast.render_scenes(part, max(size, reading.PIXELS)).astype(jnp.float32) / 127.5 - 1
        parts.append(np.asarray(drawing if size >= reading.PIXELS else augment.downsample(drawing, size)))
    return np.concatenate(parts)[: len(rows)]


def _distances(small: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Kernel distance to true renders: of the drawings, of half of the renders to the others, of blurred ones."""
    reference = reading.features(true)
    blurred = np.asarray(augment.blur(jnp.asarray(true), jnp.full(len(true), 1.0), 1.0))
    rows = {"drawn": (reading.features(small), reference), "true": (reference[::2], reference[1::2])}
    rows["blurred"] = reading.features(blurred), reference
    return {name: round(scoring.kernel_distance(a, b, reference), 5) for name, (a, b) in rows.items()}


def _later_stage(
    cascade: Cascade,
    asks: Sequence[EvalPrompt],
    first: Sequence[Image.Image],
    truth: Truth,
    folder: Path,
    options: Mapping[str, Any],
    say: Callable[[str], None],
    progress: Progress,
) -> tuple[dict[int, Image.Image], dict[str, Any]]:
    """Stage II's pictures of the words' prompts, by number, and the scores of words and of super-resolution."""
    chosen = {i: one.caption for i, one in enumerate(asks) if one.skill == "words"}
    low = [first[i] for i in chosen]
    readers = ocr.readers(say)
    if len(cascade.stages) < 2:
        say("the cascade has one stage: words are read from its pictures enlarged, super-resolution is not scored")
        return {}, _words(readers, asks, {"drawn": dict(zip(chosen, low, strict=True))})
    size = cascade.stages[1].unet_config.sample_size
    second = draw_prompts.stage_two(cascade, chosen, low, folder, options, progress)
    true = render(truth.scenes, size, list(chosen))
    bicubic = [picture.resize((size, size), Image.Resampling.BICUBIC) for picture in low]
    sets = {"drawn": second, "bicubic": bicubic, "true": [to_pil(picture) for picture in true]}
    told = _words(readers, asks, {name: dict(zip(chosen, rows, strict=True)) for name, rows in sets.items()})
    reference = reading.features(true)
    distance = {
        name: round(scoring.kernel_distance(reading.features(reading.to_array(rows, size)), reference), 5)
        for name, rows in {"drawn": second, "bicubic": bicubic}.items()
    }
    halves = scoring.kernel_distance(reference[::2], reference[1::2], reference) if len(reference) > 3 else None
    known = {"kernel_distance": distance | {"true": halves and round(halves, 5)}}
    known["objects_right"] = {
        name: _objects_right(asks, chosen, rows) for name, rows in {"I": low, "II": second}.items()
    }
    few = dict(list(chosen.items())[: min(_ENLARGED, max(2, len(asks) // 10))])
    known["psnr"] = _psnr(cascade, few, true[: len(few)], folder, options, progress)
    return dict(zip(chosen, second, strict=True)), told | {"super_resolution": known}


def _psnr(
    cascade: Cascade,
    chosen: Mapping[int, str],
    true: np.ndarray,
    folder: Path,
    options: Mapping[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    """Mean PSNR in dB of true low-resolution pictures enlarged: by bicubic, by stage II at level 0 and as it draws."""
    size, before = true.shape[1], cascade.stages[0].unet_config.sample_size
    low = [to_pil(picture) for picture in np.asarray(augment.downsample(jnp.asarray(true), before))]
    plain = dict(options.get("if_II_kwargs") or {})
    plain.pop("aug_level", None)
    sets = {"bicubic": [picture.resize((size, size), Image.Resampling.BICUBIC) for picture in low]}
    for name, how in (("level_0", plain | {"noise_level": 0}), ("default", options.get("if_II_kwargs"))):
        given = dict(options) | ({"if_II_kwargs": how} if how else {})
        sets[name] = draw_prompts.stage_two(cascade, chosen, low, folder, given, progress, name=f"true-{name}")
    figures = {}
    for name, rows in sets.items():
        found = [scoring.psnr(a, b) for a, b in zip(reading.to_array(rows, size), true, strict=True)]
        figures[name] = round(float(np.mean(found)), 3)
    return figures | {"pictures": len(true)}


def _objects_right(asks: Sequence[EvalPrompt], chosen: Mapping[int, str], rows: Sequence[Image.Image]) -> float:
    """The share of words' prompts whose objects are right, at 64 px: what stage II keeps of stage I."""
    seen = reading.read(reading.to_array(rows))
    return round(float(np.mean([scoring.right(asks[i], one) for i, one in zip(chosen, seen, strict=True)])), 4)


def _words(
    readers: Mapping[str, ocr.OcrReader], asks: Sequence[EvalPrompt], sets: Mapping[str, Mapping[int, Image.Image]]
) -> dict[str, Any]:
    """`words_exact` as RapidOCR reads the drawings, and each reader's scores of each set of pictures."""
    found: dict[str, Any] = {}
    for reader, read in readers.items():
        for name, pictures in sets.items():
            told = dict(zip(pictures, ocr.read_words(read, list(pictures.values())), strict=True))
            splits = {"": False, "_unseen": True} if name == "drawn" else {"": None}
            for split, unseen in splits.items():
                rows = [i for i in told if unseen is None or asks[i].unseen == unseen]
                scores = scoring.word_scores([asks[i].word for i in rows], [told[i] for i in rows])
                found.setdefault(reader, {})[name + split] = scores
    main = found.get("rapidocr", {}).get("drawn", {})
    return {"words_exact": main.get("exact"), "words_exact_ci": main.get("exact_ci"), "words": found}


def _losses(cascade: Cascade, asks: Sequence[EvalPrompt], truth: Truth, progress: Progress) -> dict[str, Any]:
    """The fixed-timestep loss of each stage on true renders, spread over the tasks."""
    figures = {}
    for stage, (name, count) in zip(cascade.stages, _LOSS_PICTURES.items(), strict=False):
        progress(f"loss of stage {name}", 0, 1)
        rows = np.unique(np.linspace(0, len(asks) - 1, count).astype(int))
        true = render(truth.scenes, stage.unet_config.sample_size, rows)
        figures[name] = fixed_timestep_loss.losses(cascade, name, true, [asks[i].caption for i in rows])
        progress(f"loss of stage {name}", 1, 1)
    return figures
