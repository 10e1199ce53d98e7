"""Draws the same pictures with if_jax and with stock diffusers, side by side, and says which is faster and how equal.

    python tests/benchmarks/dream_vs_diffusers.py [--cascade demo] [--batch 4] [--rounds 3] [--full]

Both sides get the same release in float32, the same prompts, steps, guidance and injected noise. Each timed call goes
from prompts to pictures (stage I) or from prompts and the stage I pictures to pictures (stage II), text encoding
included. The two sides take turns in one process, and the fastest of the rounds counts. PyTorch runs in inference
mode with scaled-dot-product attention, on all cores, in whichever memory format is faster for that stage. Compilation
is timed apart. Start-up is timed in processes of their own, one picture from nothing: if_jax with an empty compilation
cache (cold) and with a filled one (warm), diffusers eager, with each process's peak memory.

--full adds torch.compile on the other side, and one picture by a base stage of IF-I-M's shape with random weights and
text states (minutes, 12 GB). --fast DIR draws the release DIR of a student in place of the cascade, and adds a side:
stock diffusers drawing the cascade, its teacher, at the settings of its cascade.json. The last line is one JSON object;
a ratio above 1 means that if_jax is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from if_jax.checkpoints.release import write_stage
from if_jax.checkpoints.scheduler import SchedulerConfig
from if_jax.checkpoints.stages import STAGE_NAMES, StageDefaults, StageRelease
from if_jax.checkpoints.weights import abstract_params
from if_jax.diffusion.samplers import SamplerState
from if_jax.inference import cascade as cascades
from if_jax.inference.cascade import Cascade
from if_jax.inference.denoise_stage import begin_stage, finish_stage
from if_jax.inference.settings import StageSettings, stage_settings
from if_jax.inference.stage_inputs import StageInputs, StageNoise
from if_jax.models.flops import unet_flops
from if_jax.models.presets import UNETS

PROMPTS = (
    "two red spheres and a blue cube",
    "a green cylinder",
    "three yellow cubes",
    "a purple sphere left of a red cube",
)
PAUSE = 0.3  # seconds between the sides: idle threads of one would otherwise spin into the time of the other


@dataclass
class Side:
    """One stage on one side: how to draw it, and what the timed rounds gave."""

    draw: Callable[[np.ndarray | None], np.ndarray]  # low-res pictures or None -> pictures, both (B, H, W, 3)
    images: np.ndarray | None = None
    first: float = 0.0
    best: float = float("inf")

    def run(self, low_res: np.ndarray | None) -> None:
        time.sleep(PAUSE)
        start = time.perf_counter()
        self.images = self.draw(low_res)
        seconds = time.perf_counter() - start
        self.first = self.first or seconds
        self.best = min(self.best, seconds)


@dataclass
class Case:
    """One stage on both sides."""

    name: str
    stage: StageRelease
    settings: StageSettings
    noise: StageNoise
    pipeline: Any
    texts: Callable[[], tuple[np.ndarray, np.ndarray]]  # our text states: of the prompts, of the empty caption
    words: dict[str, Any]  # theirs: prompts, or their states
    count: int  # pictures


def main() -> None:
    """Measure, print lines for people and one JSON line for machines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cascade", default="demo", help="release folder, or the demo in the package")
    parser.add_argument("--batch", type=int, default=4, help="pictures drawn at a time")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds after the first")
    parser.add_argument("--steps", help="steps of every stage, to measure sooner [default: the release's]")
    parser.add_argument(
        "--fast", type=Path, metavar="DIR", help="a student's release, beside the cascade as its teacher"
    )
    parser.add_argument("--full", action="store_true", help="torch.compile too, and a stage of IF-I-M's shape")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    folder = cascades.DEMO if arguments.cascade == "demo" else Path(arguments.cascade)
    drawn, teachers = arguments.fast or folder, []
    if arguments.fast:
        teachers = cascade_cases(folder, arguments.batch, None)
        for case in teachers:
            pick_memory_format(case.pipeline, case.count * (1 + case.settings.guided))
    starts = {} if arguments.steps else start_up(drawn)
    peak, rows = matmul_peak(), []
    low: tuple[np.ndarray | None, np.ndarray | None] = (None, None)
    for number, case in enumerate(cascade_cases(drawn, arguments.batch, arguments.steps)):
        row, *low = compare_stage(case, low, arguments.rounds, peak, arguments.full, *teachers[number : number + 1])
        rows.append(row)
    if arguments.full:
        with tempfile.TemporaryDirectory() as scratch:
            case = random_case("IF-I-M", Path(scratch), 1, arguments.steps or "5")
            rows.append(compare_stage(case, (None, None), arguments.rounds, peak, True)[0])
    print(json.dumps(summary(rows, peak, arguments.batch, starts)))


def cascade_cases(folder: Path, batch: int, steps: str | None) -> list[Case]:
    """The stages of a release, from prompts to pictures."""
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(batch)]
    ours, cases = Cascade.load(folder), []
    pipelines = open_pipelines(folder, len(ours.stages))

    def texts() -> tuple[np.ndarray, np.ndarray]:
        text = ours.embed([*prompts, ""])
        return text[:-1], np.broadcast_to(text[-1:], text[:-1].shape)

    for seed, (name, stage, default) in enumerate(zip(STAGE_NAMES, ours.stages, ours.defaults, strict=False)):
        settings = stage_settings(name, stage, default, {"sample_timestep_respacing": steps} if steps else None)
        noise = make_noise(stage, settings, batch, seed)
        cases.append(Case(f"stage_{name}", stage, settings, noise, pipelines[seed], texts, {"prompt": prompts}, batch))
    return cases


def random_case(preset: str, scratch: Path, batch: int, steps: str) -> Case:
    """A base stage of a published shape: speed depends on shapes alone, so random weights and text states will do."""
    import torch
    from diffusers import IFPipeline, UNet2DConditionModel

    rng, config = np.random.default_rng(0), UNETS[preset]

    def fill(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        scale = 0.5 / np.sqrt(max(np.prod(leaf.shape[:-1]), 1))
        return rng.standard_normal(leaf.shape, np.float32) * np.float32(scale)

    stage = StageRelease("base", config, jax.tree.map(fill, abstract_params(config)), SchedulerConfig(1.5))
    write_stage(scratch / preset, stage)
    unet = UNet2DConditionModel.from_pretrained(scratch / preset / "unet").eval()
    pipeline = IFPipeline(None, None, unet, demo_scheduler(), None, None, None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    settings = stage_settings("I", stage, StageDefaults(steps, 7.0), None)
    states = rng.standard_normal((2, batch, 77, config.encoder_hid_dim), np.float32)
    words = dict(zip(("prompt_embeds", "negative_prompt_embeds"), map(torch.from_numpy, states), strict=True))
    noise = make_noise(stage, settings, batch, 0)
    return Case(preset, stage, settings, noise, pipeline, lambda: (states[0], states[1]), words, batch)


def demo_scheduler() -> Any:
    """IF's scheduler for a base stage, as diffusers has it."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        variance_type="learned_range",
        thresholding=True,
        dynamic_thresholding_ratio=0.95,
        sample_max_value=1.5,
    )


def compare_stage(
    case: Case,
    low: tuple[np.ndarray | None, np.ndarray | None],
    rounds: int,
    peak: float,
    compiled: bool,
    teacher: Case | None = None,
) -> tuple[dict, np.ndarray, np.ndarray]:
    """Time one stage on both sides in turns, then hold our steps against the reference: a row and the pictures."""
    import torch

    size, steps = case.stage.unet_config.sample_size, len(case.settings.timesteps)
    jax_side = Side(lambda low_res: draw_ours(case, low_res))
    sides = {"diffusers": Side(lambda low_res: draw_theirs(case, low_res))}
    batch = case.count * (1 + case.settings.guided)
    memory_format = pick_memory_format(case.pipeline, batch)
    if compiled:
        eager, fast = case.pipeline.unet, torch.compile(case.pipeline.unet)

        def draw_compiled(low_res: np.ndarray | None) -> np.ndarray:
            case.pipeline.unet = fast
            try:
                return draw_theirs(case, low_res)
            finally:
                case.pipeline.unet = eager

        sides["compiled"] = Side(draw_compiled)
    if teacher is not None:
        sides["teacher"] = Side(lambda low_res: draw_theirs(teacher, low_res))
    for _ in range(1 + rounds):
        jax_side.run(low[0])
        for side in sides.values():
            side.run(low[1])
    states: list[np.ndarray] = []
    theirs = draw_theirs(case, low[1], lambda i, t, x: states.append(to_numpy(x)))
    difference = np.abs(jax_side.images - theirs)
    flops = batch * steps * unet_flops(case.stage.unet_config, size)
    row = {
        "name": case.name,
        "seconds": jax_side.best,
        "compile_seconds": jax_side.first - jax_side.best,
        "step_rel_diff": step_difference(case, low[1], states),
        "mean_abs_diff": float(difference.mean()),
        "max_abs_diff": float(difference.max()),
        "share_of_matmul_peak": flops / jax_side.best / peak,
        **{f"{name}_seconds": side.best for name, side in sides.items()},
        **{f"ratio_to_{name}": side.best / jax_side.best for name, side in sides.items()},
    }
    others = "; ".join(
        f"{name} {side.best:.2f} s = {case.count / side.best:.2f} pictures/s, ratio {side.best / jax_side.best:.2f}"
        for name, side in sides.items()
    )
    print(
        f"{case.name} ({size} px, {steps} steps, guidance {case.settings.guidance_scale:g}, batch {case.count}): "
        f"if_jax {row['seconds']:.2f} s = {case.count / row['seconds']:.2f} pictures/s "
        f"({row['share_of_matmul_peak']:.0%} of the matmul peak, compiled in {row['compile_seconds']:.1f} s); "
        f"{others} ({memory_format})"
    )
    print(
        f"{case.name}: steps agree to {row['step_rel_diff']:.1e} of max |x|, pictures to {row['mean_abs_diff']:.1e} "
        f"on average, {row['max_abs_diff']:.1e} at most",
        flush=True,
    )
    return row, jax_side.images, theirs


def draw_ours(case: Case, low_res: np.ndarray | None) -> np.ndarray:
    """Texts to pictures of one stage, as `Cascade.dream` does it."""
    text, empty = case.texts()
    inputs = StageInputs(text, empty, low_res, noise=case.noise)
    return np.asarray(finish_stage(*begin_stage(case.stage, case.settings, keys(case.count), inputs)))


def draw_theirs(case: Case, low_res: np.ndarray | None, callback: Callable | None = None) -> np.ndarray:
    """The same through stock diffusers, which is handed its noise in the order in which it draws."""
    import torch
    from diffusers.pipelines.deepfloyd_if import pipeline_if, pipeline_if_superresolution
    from diffusers.schedulers import scheduling_ddpm

    noise, settings = case.noise, case.settings
    image = {} if low_res is None else {"image": to_torch(low_res), "noise_level": settings.noise_level}
    low = [] if noise.low_res is None else [noise.low_res]
    queue = iter([noise.initial, *low, *noise.steps[:0:-1]])
    steps: dict[str, Any] = {"timesteps": list(settings.timesteps[::-1])}
    if settings.sampler == "ddim":  # its scheduler takes no list; a student's is trailing
        steps = {"num_inference_steps": len(settings.timesteps)}
    modules = (pipeline_if, pipeline_if_superresolution, scheduling_ddpm)
    originals = [module.randn_tensor for module in modules]
    for module in modules:
        module.randn_tensor = lambda *_, **__: to_torch(next(queue))
    try:
        with torch.inference_mode():
            images = case.pipeline(
                **case.words,
                **steps,
                guidance_scale=settings.guidance_scale,
                output_type="pt",
                callback=callback,
                **image,
            ).images
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.randn_tensor = original
    return to_numpy(images)


def step_difference(case: Case, low_res: np.ndarray | None, states: list[np.ndarray]) -> float:
    """Each of our steps from the reference's own x_t against its x_{t-1}: the largest |Δ| / max |x|."""
    text, empty = case.texts()
    inputs = StageInputs(text, empty, low_res, noise=case.noise)
    state, advance = begin_stage(case.stage, case.settings, keys(case.count), inputs)
    worst = 0.0
    for expected in states:
        state = advance(state, 1)
        worst = max(worst, float(np.abs(state.x - expected).max() / np.abs(expected).max()))
        state = SamplerState(jnp.asarray(expected), state.x0, state.index, state.done)
    return worst


def start_up(folder: Path) -> dict[str, dict[str, float]]:
    """Seconds from nothing to one picture of every stage, and peak memory (GB), each in a process of its own."""
    starts = {}
    with tempfile.TemporaryDirectory() as scratch:
        ours = [sys.executable, "-m", "if_jax", "dream", PROMPTS[0], "--cascade", str(folder), "--overwrite"]
        ours += ["--out", f"{scratch}/out"]
        theirs = [sys.executable, "-W", "ignore", "-c", THEIR_START, str(folder)]
        for name, command in (("if_jax cold", ours), ("if_jax warm", ours), ("diffusers", theirs)):
            environment = os.environ | {"XDG_CACHE_HOME": scratch}
            start = time.perf_counter()
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise SystemExit(f"{name} failed: {' '.join(command)}")
            starts[name] = {"seconds": round(time.perf_counter() - start, 2), "peak_gb": round(peak_gb(usage), 3)}
            print(
                f"{name}: {starts[name]['seconds']:.1f} s to the first picture, {starts[name]['peak_gb']:.2f} GB",
                flush=True,
            )
    return starts


def peak_gb(usage: resource.struct_rusage) -> float:
    """Largest resident size of a process; Linux counts in KiB, macOS in bytes."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


# What a user of diffusers writes: both stages of the cascade, one picture, the release's own settings.
THEIR_START = """
import json, sys, torch
from diffusers import DiffusionPipeline
from if_jax.diffusion.schedule import parse_steps
folder, image, first = sys.argv[1], None, None
for stage in json.load(open(f"{folder}/cascade.json"))["stages"]:
    defaults = stage["defaults"]
    parts = {} if first is None else {"text_encoder": first.text_encoder, "tokenizer": first.tokenizer}
    pipeline = DiffusionPipeline.from_pretrained(f"{folder}/{stage['folder']}", torch_dtype=torch.float32, **parts)
    low_res = {} if image is None else {"image": image, "noise_level": defaults["noise_level"]}
    steps = parse_steps(defaults["sample_timestep_respacing"])[::-1].tolist()
    ddim = type(pipeline.scheduler).__name__ == "DDIMScheduler"
    steps = {"num_inference_steps": len(steps)} if ddim else {"timesteps": steps}
    with torch.inference_mode():
        image = pipeline("two red spheres", **steps, guidance_scale=defaults["guidance_scale"],
                         output_type="pt", **low_res).images
    first = first or pipeline
"""


def open_pipelines(folder: Path, count: int) -> list[Any]:
    """Every stage folder as diffusers opens it, in float32; later stages borrow the text encoder of the first."""
    import torch
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    pipelines: list[Any] = []
    for name in STAGE_NAMES[:count]:
        parts = (
            {} if not pipelines else {"text_encoder": pipelines[0].text_encoder, "tokenizer": pipelines[0].tokenizer}
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipeline = DiffusionPipeline.from_pretrained(folder / f"stage_{name}", torch_dtype=torch.float32, **parts)
        pipeline.set_progress_bar_config(disable=True)
        pipelines.append(pipeline)
    return pipelines


def pick_memory_format(pipeline: Any, rows: int) -> str:
    """Leave the UNet in the memory format in which a forward pass of a batch of `rows` is faster; return its name."""
    import torch

    config, seconds = pipeline.unet.config, {}
    x = torch.zeros(rows, config.in_channels, config.sample_size, config.sample_size)
    inputs = {"encoder_hidden_states": torch.zeros(rows, 77, config.encoder_hid_dim)}
    if config.class_embed_type:
        inputs["class_labels"] = torch.zeros(rows, dtype=torch.long)
    for name in ("contiguous_format", "channels_last"):
        memory_format = getattr(torch, name)
        pipeline.unet.to(memory_format=memory_format)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            with torch.inference_mode():
                pipeline.unet(x.to(memory_format=memory_format), 500, **inputs)
            times.append(time.perf_counter() - start)
        seconds[name] = min(times)
    best = min(seconds, key=seconds.get)
    pipeline.unet.to(memory_format=getattr(torch, best))
    return best


def make_noise(stage: StageRelease, settings: StageSettings, batch: int, seed: int) -> StageNoise:
    """Everything the two sides would otherwise draw, each with its own generator."""
    rng = np.random.default_rng(seed)
    shape = (batch, stage.unet_config.sample_size, stage.unet_config.sample_size, 3)

    def normal(*lead: int) -> np.ndarray:
        return rng.standard_normal((*lead, *shape), np.float32)

    return StageNoise(normal(), normal(len(settings.timesteps)), None if settings.noise_level is None else normal())


def matmul_peak(size: int = 2048) -> float:
    """FLOP/s of the best float32 matrix product of this machine, as JAX runs it."""
    a = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def summary(rows: list[dict], peak: float, batch: int, starts: dict) -> dict:
    """The last line: the ratios first, the worst difference of the stages, and every stage's own figures."""
    ratios = {
        f"stage_{number}_{key.replace('ratio_to_diffusers', 'ratio')}": round(value, 3)
        for number, row in enumerate(rows, 1)
        for key, value in row.items()
        if key.startswith("ratio")
    }
    for side in ("diffusers", "teacher"):
        if all(f"{side}_seconds" in row for row in rows):  # prompts to the last stage's pictures
            whole = sum(row[f"{side}_seconds"] for row in rows) / sum(row["seconds"] for row in rows)
            ratios[f"cascade_ratio_to_{side}"] = round(whole, 3)
    return {
        **ratios,
        "step_rel_diff": max(row["step_rel_diff"] for row in rows),
        "picture_mean_abs_diff": max(row["mean_abs_diff"] for row in rows),
        "picture_max_abs_diff": max(row["max_abs_diff"] for row in rows),
        "stages": [{key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in row.items()} for row in rows],
        "start_up": starts,
        "matmul_gflops": round(peak / 1e9, 1),
        "batch": batch,
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("jax", "torch", "diffusers")},
    }


def keys(count: int) -> jax.Array:
    """Keys for a sampler that is handed its noise: never used."""
    return jax.random.split(jax.random.key(0, impl="threefry2x32"), count)


def to_torch(images: np.ndarray) -> Any:
    """NHWC array to NCHW tensor."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1)))


def to_numpy(images: Any) -> np.ndarray:
    """NCHW tensor to NHWC array."""
    return np.ascontiguousarray(np.moveaxis(images.numpy(), 1, -1))


if __name__ == "__main__":
    sys.exit(main())
