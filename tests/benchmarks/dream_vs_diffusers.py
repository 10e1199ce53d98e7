"""Draws the same pictures with if_jax and with stock diffusers, side by side, and says which is faster and how equal.

    python tests/benchmarks/dream_vs_diffusers.py [--cascade demo] [--batch 4] [--rounds 3]

Both sides get the same release in float32, the same prompts, steps, guidance and injected noise. Each timed call goes
from prompts to pictures (stage I) or from prompts and the stage I pictures to pictures (stage II), text encoding
included. The two sides take turns in one process, and the fastest of the rounds counts. PyTorch runs in inference
mode with scaled-dot-product attention, on all cores, in whichever memory format is faster for that stage. Compilation
is timed apart. The last line is one JSON object; a ratio above 1 means that if_jax is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
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

from if_jax.checkpoints.release import STAGE_NAMES
from if_jax.diffusion import augment, samplers
from if_jax.diffusion.schedule import cosine_schedule, respace
from if_jax.inference import cascade as cascades
from if_jax.inference.cascade import Cascade
from if_jax.inference.drawing import StageNoise, draw_stage, make_denoiser, stage_settings
from if_jax.models.flops import unet_flops

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


def main() -> None:
    """Measure, print lines for people and one JSON line for machines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cascade", default="demo", help="release folder, or the demo in the package")
    parser.add_argument("--batch", type=int, default=4, help="pictures drawn at a time")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds after the first")
    given = parser.parse_args()
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    folder = cascades.DEMO if given.cascade == "demo" else Path(given.cascade)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(given.batch)]
    ours = Cascade.load(folder)
    settings = [
        stage_settings(name, stage, default, None)
        for name, stage, default in zip(STAGE_NAMES, ours.stages, ours.defaults, strict=False)
    ]
    noise = [
        make_noise(stage, how, len(prompts), seed)
        for seed, (stage, how) in enumerate(zip(ours.stages, settings, strict=True))
    ]
    pipelines = open_pipelines(folder, len(ours.stages))
    rows, low_ours, low_theirs, peak = [], None, None, matmul_peak()
    for index, how in enumerate(settings):
        row, low_ours, low_theirs = compare_stage(
            ours, index, how, noise[index], pipelines[index], prompts, (low_ours, low_theirs), given.rounds, peak
        )
        rows.append(row)
    print(json.dumps(summary(rows, peak, prompts)))


def compare_stage(
    ours: Cascade,
    index: int,
    how: Any,
    noise: StageNoise,
    pipeline: Any,
    prompts: list[str],
    low: tuple[np.ndarray | None, np.ndarray | None],
    rounds: int,
    peak: float,
) -> tuple[dict, np.ndarray, np.ndarray]:
    """Time one stage on both sides in turns, then hold our steps against the reference: a row and the pictures."""
    stage, name = ours.stages[index], STAGE_NAMES[index]
    jax_side = Side(lambda low_res: draw_ours(ours, index, how, noise, prompts, low_res))
    torch_side = Side(lambda low_res: draw_theirs(pipeline, how, noise, prompts, low_res))
    rows = len(prompts) * (1 + (how.guidance_scale != 1.0))
    memory_format = pick_memory_format(pipeline, rows)
    for _ in range(1 + rounds):
        jax_side.run(low[0])
        torch_side.run(low[1])
    states = [noise.initial]
    draw_theirs(pipeline, how, noise, prompts, low[1], lambda i, t, x: states.append(to_numpy(x)))
    difference = np.abs(jax_side.images - torch_side.images)
    flops = rows * len(how.timesteps) * unet_flops(stage.unet_config, stage.unet_config.sample_size)
    row = {
        "seconds": jax_side.best,
        "diffusers_seconds": torch_side.best,
        "compile_seconds": jax_side.first - jax_side.best,
        "ratio": torch_side.best / jax_side.best,
        "step_rel_diff": step_difference(ours, index, how, noise, prompts, low[1], states),
        "mean_abs_diff": float(difference.mean()),
        "max_abs_diff": float(difference.max()),
        "share_of_matmul_peak": flops / jax_side.best / peak,
        "diffusers_share": flops / torch_side.best / peak,
    }
    size, count = stage.unet_config.sample_size, len(prompts)
    print(
        f"stage {name} ({size} px, {len(how.timesteps)} steps, guidance {how.guidance_scale:g}, batch {count}): "
        f"if_jax {row['seconds']:.2f} s = {count / row['seconds']:.2f} pictures/s "
        f"({row['share_of_matmul_peak']:.0%} of the matmul peak, compiled in {row['compile_seconds']:.1f} s); "
        f"diffusers {row['diffusers_seconds']:.2f} s = {count / row['diffusers_seconds']:.2f} pictures/s "
        f"({row['diffusers_share']:.0%}, {memory_format}); ratio {row['ratio']:.2f}"
    )
    print(
        f"stage {name}: steps agree to {row['step_rel_diff']:.1e} of max |x|, pictures to {row['mean_abs_diff']:.1e} "
        f"on average, {row['max_abs_diff']:.1e} at most",
        flush=True,
    )
    return row, jax_side.images, torch_side.images


def draw_ours(
    ours: Cascade, index: int, how: Any, noise: StageNoise, prompts: list[str], low_res: np.ndarray | None
) -> np.ndarray:
    """Prompts to pictures of one stage, as `Cascade.dream` does it."""
    text = ours.embed([*prompts, ""])
    uncond = jnp.broadcast_to(text[-1:], text[:-1].shape)
    return np.asarray(draw_stage(ours.stages[index], how, keys(len(prompts)), text[:-1], uncond, low_res, noise))


def draw_theirs(
    pipeline: Any,
    how: Any,
    noise: StageNoise,
    prompts: list[str],
    low_res: np.ndarray | None,
    callback: Callable | None = None,
) -> np.ndarray:
    """The same through stock diffusers, which is handed its noise in the order in which it draws."""
    import torch
    from diffusers.pipelines.deepfloyd_if import pipeline_if, pipeline_if_superresolution
    from diffusers.schedulers import scheduling_ddpm

    given = {} if low_res is None else {"image": to_torch(low_res), "noise_level": how.noise_level}
    low = [] if noise.low_res is None else [noise.low_res]
    queue = iter([noise.initial, *low, *noise.steps[:0:-1]])
    modules = (pipeline_if, pipeline_if_superresolution, scheduling_ddpm)
    originals = [module.randn_tensor for module in modules]
    for module in modules:
        module.randn_tensor = lambda *_, **__: to_torch(next(queue))
    try:
        with torch.inference_mode():
            images = pipeline(
                prompts,
                timesteps=list(how.timesteps[::-1]),
                guidance_scale=how.guidance_scale,
                output_type="pt",
                callback=callback,
                **given,
            ).images
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.randn_tensor = original
    return to_numpy(images)


def step_difference(
    ours: Cascade,
    index: int,
    how: Any,
    noise: StageNoise,
    prompts: list[str],
    low_res: np.ndarray | None,
    states: list[np.ndarray],
) -> float:
    """Each of our steps from the reference's own x_t against its x_{t-1}: the largest |Δ| / max |x|."""
    stage, count = ours.stages[index], len(prompts)
    text = ours.embed([*prompts, ""])
    schedule = respace(cosine_schedule(), how.timesteps)
    uncond = None if how.guidance_scale == 1.0 else jnp.broadcast_to(text[-1:], text[:-1].shape)
    shown = {"text": text[:-1]}
    if low_res is not None:
        level = jnp.full((count,), how.noise_level)
        low = augment.upsample(jnp.asarray(low_res), stage.unet_config.sample_size)
        shown |= {"level": level, "low": augment.noise_augment(cosine_schedule(), low, level, noise.low_res)}

    @jax.jit
    def step(params: Any, shown: dict, uncond: Any, x_t: jax.Array, i: jax.Array, z: jax.Array) -> jax.Array:
        denoise = make_denoiser(params, stage.unet_config, shown, uncond, how.guidance_scale)
        output = denoise(x_t, jnp.full(count, jnp.asarray(schedule.timesteps)[i]))
        return samplers.ancestral_step(
            schedule,
            output,
            x_t,
            jnp.full(count, i),
            z,
            prediction=how.scheduler.prediction,
            sample_max_value=how.scheduler.sample_max_value,
            threshold_ratio=how.scheduler.dynamic_thresholding_ratio,
        )[0]

    worst = 0.0
    for row, i in enumerate(range(schedule.num_steps - 1, -1, -1)):
        found = np.asarray(step(stage.unet_params, shown, uncond, states[row], i, noise.steps[i]))
        worst = max(worst, float(np.abs(found - states[row + 1]).max() / np.abs(states[row + 1]).max()))
    return worst


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


def make_noise(stage: Any, how: Any, batch: int, seed: int) -> StageNoise:
    """Everything the two sides would otherwise draw, each with its own generator."""
    rng = np.random.default_rng(seed)
    shape = (batch, stage.unet_config.sample_size, stage.unet_config.sample_size, 3)

    def normal(*lead: int) -> np.ndarray:
        return rng.standard_normal((*lead, *shape), np.float32)

    return StageNoise(normal(), normal(len(how.timesteps)), None if how.noise_level is None else normal())


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


def summary(rows: list[dict], peak: float, prompts: list[str]) -> dict:
    """The last line: the ratios first, the worst difference of the stages, and every stage's own figures."""
    ratios = {f"stage_{i}_ratio": round(row["ratio"], 3) for i, row in enumerate(rows, 1)}
    seconds = {
        f"stage_{i}": {"if_jax": round(row["seconds"], 3), "diffusers": round(row["diffusers_seconds"], 3)}
        for i, row in enumerate(rows, 1)
    }
    return {
        **ratios,
        "step_rel_diff": max(row["step_rel_diff"] for row in rows),
        "picture_mean_abs_diff": max(row["mean_abs_diff"] for row in rows),
        "picture_max_abs_diff": max(row["max_abs_diff"] for row in rows),
        "seconds": seconds,
        "compile_seconds": {f"stage_{i}": round(row["compile_seconds"], 2) for i, row in enumerate(rows, 1)},
        "share_of_matmul_peak": {f"stage_{i}": round(row["share_of_matmul_peak"], 3) for i, row in enumerate(rows, 1)},
        "matmul_gflops": round(peak / 1e9, 1),
        "batch": len(prompts),
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
