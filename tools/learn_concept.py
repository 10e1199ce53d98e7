"""The demo's stage I learns something it cannot draw, from twelve pictures: solids dipped in black paint, called "sks".

    python tools/learn_concept.py [--steps 260] [--drawings 48] [--prompts 0] [--workdir DIR] [--out docs/assets]

By the commands of docs/finetune.md: twelve pictures of the source `dipped`, a LoRA on them and on ordinary scenes in
equal parts, its file. Then it asks for every colour and shape as "sks", with the file and without, and counts in how
many drawings a program sees the paint; `--prompts N` scores N ordinary prompts of SynthEval with it and without.
Writes OUT/learned-concept.webp (what it learned from; drawn without the LoRA; with it; ordinary prompts with it) and
prints one JSON line. Interrupted, the same command with the same --workdir goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from if_jax import Cascade
from if_jax.inference.pictures import grid
from if_jax.scenes import dipped, raycast
from if_jax.scenes.scene import COLOURS, SHAPES, as_numpy

ROOT = Path(__file__).parents[1]
COUNT, SEED = 12, 12
ORDINARY = (
    "a red cube",
    "a blue sphere and a green cylinder",
    "two yellow spheres",
    "a purple sphere left of a red cube",
)
SAMPLER = {"sample_loop": "dpm++", "sample_timestep_respacing": "10"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=260, help="updates, 8 pictures each")
    parser.add_argument("--targets", default="attention+conv", help="recipe key lora.targets")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--drawings", type=int, default=48)
    parser.add_argument(
        "--prompts", type=int, default=0, help="of SynthEval, by stage I with the LoRA and without; 0: none"
    )
    parser.add_argument("--fast", action="store_true", help="draw with DPM-Solver++ in 10 steps, not as the demo does")
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/assets")
    args = parser.parse_args()
    work = args.workdir or Path(tempfile.mkdtemp(prefix="concept-"))
    own = write_pictures(work / "pictures")
    began, spent = time.time(), os.times()
    if_jax("train", *recipe(work, args.steps, args.targets, args.rate))
    if_jax("export", work / "run", "--lora", work / "sks", "--overwrite")
    used = os.times()
    seconds = {"seconds": time.time() - began, "cpu_seconds": sum(used[2:4]) - sum(spent[2:4])}  # of the commands
    words = SAMPLER if args.fast else {}
    prompts = [dipped.describe(colour, shape) for colour in COLOURS for shape in SHAPES]
    prompts = (prompts * -(-args.drawings // len(prompts)))[: args.drawings]
    with_it = draw([*prompts, *ORDINARY], {work / "sks": 1.0}, words)
    without = draw(prompts[:8], None, words)
    drawn, ordinary = with_it[: len(prompts)], with_it[len(prompts) :]
    report: dict[str, Any] = {name: round(value) for name, value in seconds.items()} | {
        "dipped": round(float(np.mean(are_dipped(drawn))), 3),
        "dipped_without_lora": round(float(np.mean(are_dipped(without))), 3),
        "dipped_in_ordinary": round(float(np.mean(are_dipped(ordinary))), 3),
    }
    rows = [own[:8], without, drawn[:: max(1, len(drawn) // 16)][:16], ordinary]
    sheet = grid([picture for row in rows for picture in row], columns=8)
    sheet.resize((2 * sheet.width, 2 * sheet.height), 0).save(args.out / "learned-concept.webp", quality=90)
    print(json.dumps(report))
    if args.prompts:
        report |= synth_eval(work, args.prompts, args.fast)
    print(json.dumps(report))


def recipe(work: Path, steps: int, targets: str, rate: float) -> list[str]:
    """The options of `if-jax train`."""
    keys = {
        "data.source": f"0.5*{work / 'pictures'} + 0.5*tasks",
        "data.caption_dropout": 0.0,
        "lora.targets": targets,
        "optimizer.learning_rate": rate,
        "batch_size": 8,
        "steps": steps,
        "optimizer.warmup_steps": 10,
        "ema_decays": (0.97,),
        "checkpoint_every": 20,
        "sample.every": 0,
    }
    options = ["--config", str(ROOT / "configs/finetune_lora.py:demo"), "--workdir", str(work / "run")]
    return options + [f"--config.{name}={value}" for name, value in keys.items()]


def write_pictures(folder: Path) -> list[Image.Image]:
    """Twelve dipped solids with their captions, no two alike in colour and shape, four of each shape."""
    scenes = dipped.sample_dipped(np.arange(400), SEED)
    captions = [dipped.caption(scene, np.random.default_rng()) for scene in as_numpy(scenes)]
    chosen: dict[str, int] = {}
    for number, caption in enumerate(captions):
        _, colour, _, shape = caption.split()
        like = [other for other in chosen if other.endswith(shape)]
        coloured = [other for other in chosen if colour in other.split()]
        if caption not in chosen and len(like) < COUNT // len(SHAPES) and len(coloured) < 2:
            chosen[caption] = number
    rows = jax.tree.map(lambda field: field[np.array(list(chosen.values()))], scenes)
    pictures = [Image.fromarray(picture) for picture in np.asarray(raycast.render_scenes(rows, 64, dipped.which(rows)))]
    folder.mkdir(parents=True, exist_ok=True)
    for number, (caption, picture) in enumerate(zip(chosen, pictures, strict=True)):
        picture.save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(caption)
    return pictures


def draw(prompts: Sequence[str], lora: dict[str | Path, float] | None, words: dict[str, Any]) -> list[Image.Image]:
    """What stage I draws."""
    return Cascade.load("demo", stages=1, lora=lora).dream(list(prompts), batch_size=4, if_I_kwargs=words)["I"]


def are_dipped(pictures: Sequence[Image.Image]) -> np.ndarray:
    """Which are dipped."""
    return dipped.is_dipped(np.stack([np.asarray(picture.convert("RGB")) for picture in pictures]))


def synth_eval(work: Path, prompts: int, fast: bool) -> dict[str, Any]:
    """The share of ordinary prompts that stage I draws right, with its interval: with the LoRA and without."""
    options = ["--guidance", 2, *(["--sampler", "dpm++", "--steps", 10] if fast else ["--steps", "smart27"])]
    report: dict[str, Any] = {"prompts": prompts}
    for name, lora in (("with", ["--lora", work / "sks"]), ("without", [])):
        scores = work / f"scores-{name}.json"
        options_of_it = [*options, *lora, "--out", work / f"scores-{name}", "--json", scores, "--prompts", prompts]
        if_jax("evaluate", "--cascade", ROOT / "if_jax/demo/stage_I", *options_of_it)
        measured = json.loads(scores.read_text())
        report[f"synth_eval_{name}"] = [measured["overall"], *measured["overall_ci"]]
    return report


def if_jax(*words: object) -> None:
    """Runs the command line of if_jax."""
    subprocess.run([sys.executable, "-m", "if_jax", *map(str, words)], check=True)


if __name__ == "__main__":
    main()
