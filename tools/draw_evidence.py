"""Draws the README's evidence: 64 prompts of a fresh seed without selection, and later stages beside bicubic.

    python tools/draw_evidence.py [--cascade demo] [--seed 7] [--prompts 64] [--out docs/assets]

Prompts are the captions of scenes that no recipe trains on; the super-resolution sheets start from small versions of
such scenes, so that the truth is known. What is larger than 256 px is shown by its centre.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from if_jax import Cascade
from if_jax.checkpoints.stages import STAGE_NAMES
from if_jax.diffusion import augment
from if_jax.inference.denoise_stage import begin_stage, finish_stage
from if_jax.inference.pictures import grid, to_pil
from if_jax.inference.settings import stage_settings
from if_jax.inference.stage_inputs import StageInputs
from if_jax.scenes import sources

ASSETS = Path(__file__).parents[1] / "docs/assets"
COUNT, ROWS, SHOWN = 64, 6, 256


def main() -> None:
    """Writes prompts-I.webp, prompts-II.webp, prompts.txt and super-resolution-II.webp, … into OUT."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cascade", default="demo")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--prompts", type=int, default=COUNT, help="0: the super-resolution sheets alone")
    parser.add_argument("--out", type=Path, default=ASSETS)
    args = parser.parse_args()
    cascade = Cascade.load(args.cascade)
    if args.prompts:
        captions = [caption for _, caption, _ in sources.draw("tasks", range(args.prompts), args.seed, 64)]
        (args.out / "prompts.txt").write_text("".join(f"{caption}\n" for caption in captions))
        for stage, pictures in cascade.dream(captions, seed=args.seed, batch_size=8, stages=2).items():
            grid(pictures, columns=8).save(args.out / f"prompts-{stage}.webp", quality=80)
    for number, name in enumerate(STAGE_NAMES[1 : len(cascade.stages)], 1):
        sheet = super_resolution_sheet(cascade, number, args.seed)
        sheet.save(args.out / f"super-resolution-{name}.webp", quality=90)


def super_resolution_sheet(cascade: Cascade, number: int, seed: int) -> Image.Image:
    """Columns: the small picture, bicubic, the stage of this number, truth. Prints the errors of both enlargements."""
    name, stage, default = STAGE_NAMES[number], cascade.stages[number], cascade.defaults[number]
    size = stage.unet_config.sample_size
    pictures, captions, _ = zip(*sources.draw("tasks", range(ROWS), seed, size), strict=True)
    truth = np.stack(pictures).astype(np.float32) / 127.5 - 1
    low = augment.downsample(jnp.asarray(truth), cascade.stages[number - 1].unet_config.sample_size)
    states = cascade.embed([*captions, ""])
    drawn, settings = [], stage_settings(name, stage, default, None)
    for row, key in enumerate(
        jax.random.split(jax.random.key(0), ROWS)
    ):  # one at a time: a picture of 1024 px is large
        inputs = StageInputs(states[row : row + 1], states[-1:], low[row : row + 1])
        drawn.append(np.asarray(finish_stage(*begin_stage(stage, settings, key[None], inputs)))[0])
    small = [to_pil(image) for image in np.asarray(low)]
    bicubic = [picture.resize((size, size), 3) for picture in small]
    errors = {"bicubic": _rms(np.stack([_floats(picture) for picture in bicubic]), truth)}
    errors[f"stage {name}"] = _rms(np.stack(drawn), truth)
    print("RMS error on [-1, 1]:", ", ".join(f"{way} {error:.4f}" for way, error in errors.items()))
    columns = (
        [picture.resize((size, size), 0) for picture in small],
        bicubic,
        [to_pil(image) for image in drawn],
        [to_pil(image) for image in truth],
    )
    edge = max(0, size - SHOWN) // 2
    centre = (edge, edge, size - edge, size - edge)
    return grid([picture.crop(centre) for row in zip(*columns, strict=True) for picture in row], columns=4)


def _floats(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, np.float32) / 127.5 - 1


def _rms(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((np.clip(a, -1, 1) - b) ** 2)))


if __name__ == "__main__":
    main()
