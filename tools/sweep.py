"""Which guidance, sampler and steps draw best: SynthEval's six tasks over each, drawn from prompts of its own.

    python tools/sweep.py [--cascade demo] [--prompts 60] [--seed 900] [--out docs/assets] [--workdir DIR]

Stage I alone. Guidance is varied at the cascade's own steps, samplers and steps at its own guidance. Writes
OUT/sweep.json, OUT/sweep.webp (quality against guidance, quality against seconds a picture) and
OUT/sweep-pictures.webp (a row for each setting, the same prompts and noise). Seed and prompts are none that a report is
made of, so that defaults may be chosen by it. Interrupted, the same command with the same --workdir goes on.
Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from PIL import Image

from if_jax import Cascade
from if_jax.checkpoints.files import read_json, write_json
from if_jax.evaluation import draw_prompts
from if_jax.evaluation.synth import eval_prompts, reading
from if_jax.evaluation.synth.scoring import score_objects
from if_jax.inference.cascade import DEMO
from if_jax.inference.pictures import grid

ASSETS = Path(__file__).parents[1] / "docs/assets"
GUIDANCE = (1.0, 1.5, 2.0, 3.0, 5.0)
STEPS = {
    "DDPM 100": {"sample_timestep_respacing": "100"},
    "DDIM 50": {"sample_loop": "ddim", "sample_timestep_respacing": "50"},
    "DDIM 25": {"sample_loop": "ddim", "sample_timestep_respacing": "25"},
    "DPM-Solver++ 20": {"sample_loop": "dpm++", "sample_timestep_respacing": "20"},
    "DPM-Solver++ 10": {"sample_loop": "dpm++", "sample_timestep_respacing": "ays10"},
}


def main() -> None:
    """Draws and scores every setting; prints one JSON line a setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cascade", default="demo")
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--seed", type=int, default=900)
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--workdir", type=Path)
    args = parser.parse_args()
    work = args.workdir or Path(tempfile.mkdtemp(prefix="sweep-"))
    cascade = Cascade.load(args.cascade)
    prompts = [prompt for prompt in eval_prompts.sample_prompts(args.prompts, args.seed)[0] if prompt.skill != "words"]
    default = cascade.defaults[0]
    identity = draw_prompts.cascade_sha256(DEMO if args.cascade == "demo" else Path(args.cascade))
    settings = {f"guidance {scale:g}": {"guidance_scale": scale} for scale in GUIDANCE} | STEPS
    rows, sheet, sheet_captions = {}, [], []
    of_tasks = [
        next(i for i, prompt in enumerate(prompts) if prompt.skill == skill) for skill in eval_prompts.OBJECT_SKILLS
    ]
    for name, words in settings.items():
        pictures, rows[name] = measure(cascade, identity, prompts, words, work / name.replace(" ", "-"), args.seed)
        print(json.dumps({"setting": name} | rows[name]), flush=True)
        sheet += [pictures[i].resize((128, 128), Image.Resampling.NEAREST) for i in of_tasks]
        sheet_captions += [name if i == of_tasks[0] else "" for i in of_tasks]
    about = {"defaults": f"{default.sample_timestep_respacing}, guidance {default.guidance_scale:g}"}
    write_json(args.out / "sweep.json", about | {"prompts": len(prompts), "seed": args.seed, "settings": rows})
    grid(sheet, columns=len(of_tasks), captions=sheet_captions).save(args.out / "sweep-pictures.webp", quality=85)
    plot(rows, about["defaults"], args.out / "sweep.webp")


def measure(
    cascade: Cascade,
    cascade_sha256: str,
    prompts: list[eval_prompts.EvalPrompt],
    words: dict[str, Any],
    folder: Path,
    seed: int,
) -> tuple[list[Image.Image], dict[str, Any]]:
    """The pictures of one setting, and its scores with the seconds a picture takes once its program is compiled."""
    draw_prompts.claim_folder(
        folder, {"settings": words, "prompts": eval_prompts.sha256(prompts), "seed": seed, "cascade": cascade_sha256}
    )
    times: list[float] = []
    options = {"seed": seed, "if_I_kwargs": words}
    captions = [prompt.caption for prompt in prompts]
    pictures = draw_prompts.stage_one(cascade, captions, folder, options, lambda *_: times.append(time.monotonic()))
    tiles = [b - a for a, b in pairwise(times) if b - a > 0.01]  # others lie there from an interrupted call
    known = folder / "seconds.json"
    if not known.exists():
        write_json(known, {"seconds": round(statistics.median(tiles) / draw_prompts.TILE, 3)})
    scores = score_objects(
        [prompt._replace(unseen=False) for prompt in prompts], reading.read(reading.to_array(pictures))
    )
    names = ("overall", "overall_ci", *eval_prompts.OBJECT_SKILLS)
    return pictures, {name: scores[name] for name in names} | read_json(known)


def plot(rows: dict[str, dict[str, Any]], default: str, path: Path) -> None:
    """Two panels with 95 % intervals; the default's guidance and steps are named."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    scales = [f"guidance {scale:g}" for scale in GUIDANCE]
    for panel, names, across in (
        (left, scales, list(GUIDANCE)),
        (right, list(STEPS), [rows[name]["seconds"] for name in STEPS]),
    ):
        middle = [rows[name]["overall"] for name in names]
        ends = [[abs(rows[name]["overall_ci"][k] - rows[name]["overall"]) for name in names] for k in (0, 1)]
        panel.errorbar(across, middle, yerr=ends, fmt="o-" if panel is left else "o", capsize=3)
        panel.grid(alpha=0.3)
    for name in STEPS:
        right.annotate(name, (rows[name]["seconds"], rows[name]["overall"]), (6, 6), textcoords="offset points")
    left.set(xlabel="guidance scale", ylabel="SynthEval, mean of six tasks", title=f"default: {default}")
    right.set(xlabel="seconds a picture, stage I, compiled", title="sampler and steps at the default guidance")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
