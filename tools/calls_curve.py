"""What a network call buys: SynthEval of stage I by its number, for a teacher's samplers and for its student.

    python tools/calls_curve.py [--teacher demo] [--student DIR] [--prompts 60] [--seed 900] [--workdir DIR] [--out DIR]

The teacher draws at its own guidance, two calls a step, by DDPM, DDIM and DPM-Solver++; the student without, one call a
step. Both take trailing steps. Writes OUT/calls.json and OUT/calls.webp. Interrupted, the same command with the same
--workdir goes on. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from sweep import ASSETS, measure

from if_jax import Cascade
from if_jax.checkpoints.files import write_json
from if_jax.evaluation import draw_prompts
from if_jax.evaluation.synth import eval_prompts
from if_jax.inference.cascade import DEMO

SAMPLERS = {"DDPM": "ddpm", "DDIM": "ddim", "DPM-Solver++": "dpm++"}
TEACHER_STEPS, STUDENT_STEPS = (4, 8, 20, 40), (1, 2, 4)


def main() -> None:
    """Draws and scores every point; prints one JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="demo")
    parser.add_argument("--student", help="release of a student [default: the teacher alone]")
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--seed", type=int, default=900)
    parser.add_argument("--teacher-steps", type=_numbers, default=TEACHER_STEPS, help="joined by commas")
    parser.add_argument("--student-steps", type=_numbers, default=STUDENT_STEPS, help="joined by commas")
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--out", type=Path, default=ASSETS)
    args = parser.parse_args()
    work = args.workdir or Path(tempfile.mkdtemp(prefix="calls-"))
    prompts = [prompt for prompt in eval_prompts.sample_prompts(args.prompts, args.seed)[0] if prompt.skill != "words"]
    lines: dict[str, list[dict[str, Any]]] = {}
    for name, sampler in SAMPLERS.items():
        settings = [{"sample_loop": sampler, "sample_timestep_respacing": f"trailing{n}"} for n in args.teacher_steps]
        lines[name] = measure_all(args.teacher, settings, prompts, work / name, args.seed)
    if args.student:
        settings = [{"sample_timestep_respacing": f"trailing{n}"} for n in args.student_steps]
        lines["student"] = measure_all(args.student, settings, prompts, work / "student", args.seed)
    write_json(args.out / "calls.json", {"prompts": len(prompts), "seed": args.seed, "lines": lines})
    plot(lines, args.out / "calls.webp")


def measure_all(
    folder: str, settings: list[dict[str, Any]], prompts: list[eval_prompts.EvalPrompt], work: Path, seed: int
) -> list[dict[str, Any]]:
    """The scores of stage I of a release at each setting, with the network calls that a picture takes."""
    cascade = Cascade.load(folder, stages=1)
    identity = draw_prompts.cascade_sha256(DEMO if folder == "demo" else Path(folder))
    branches, rows = 1 if cascade.defaults[0].guidance_scale == 1 else 2, []
    for words in settings:
        steps = int(words["sample_timestep_respacing"].removeprefix("trailing"))
        scores = measure(cascade, identity, prompts, words, work / str(steps), seed)[1]
        rows.append({"calls": branches * steps} | scores)
        print(json.dumps({"release": folder, **words} | rows[-1]), flush=True)
    return rows


def plot(lines: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """One line for each sampler, with 95 % intervals."""
    figure, panel = pyplot.subplots(figsize=(6, 4))
    for name, rows in lines.items():
        middle = [row["overall"] for row in rows]
        ends = [[abs(row["overall_ci"][k] - row["overall"]) for row in rows] for k in (0, 1)]
        panel.errorbar([row["calls"] for row in rows], middle, yerr=ends, fmt="o-", capsize=3, label=name)
    panel.set(xlabel="network calls a picture", ylabel="SynthEval, mean of six tasks")
    panel.set_xscale("log", base=2)
    panel.legend()
    panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


if __name__ == "__main__":
    main()
