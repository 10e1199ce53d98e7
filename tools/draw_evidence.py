"""Draws the README's evidence: 64 prompts of a fresh seed without selection, and stage II beside bicubic.

    python tools/draw_evidence.py [--cascade demo] [--seed 7] [--prompts 64] [--out docs/assets]

Prompts are the captions of scenes that no recipe trains on; the super-resolution sheet starts from 64 px versions of
such scenes, so that the truth is known.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from if_jax import Cascade
from if_jax.diffusion import augment
from if_jax.inference.denoise_stage import begin_stage, finish_stage
from if_jax.inference.pictures import grid, to_pil
from if_jax.inference.settings import stage_settings
from if_jax.inference.stage_inputs import StageInputs
from if_jax.scenes import sources

ASSETS = Path(__file__).parents[1] / "docs/assets"
COUNT, ROWS = 64, 6


def main() -> None:
    """Writes OUT/prompts-I.webp, OUT/prompts-II.webp, OUT/prompts.txt and OUT/super-resolution.webp."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cascade", default="demo")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--prompts", type=int, default=COUNT, help="0: the super-resolution sheet alone")
    parser.add_argument("--out", type=Path, default=ASSETS)
    args = parser.parse_args()
    cascade = Cascade.load(args.cascade)
    size = cascade.stages[1].unet_config.sample_size
    numbers = range(max(args.prompts, ROWS))
    scenes = [(picture, caption) for picture, caption, _ in sources.draw("tasks", numbers, args.seed, size)]
    if captions := [caption for _, caption in scenes][: args.prompts]:
        (args.out / "prompts.txt").write_text("".join(f"{caption}\n" for caption in captions))
        for stage, pictures in cascade.dream(captions, seed=args.seed, batch_size=8).items():
            grid(pictures, columns=8).save(args.out / f"prompts-{stage}.webp", quality=80)
    sheet = super_resolution_sheet(cascade, *zip(*scenes[:ROWS], strict=True))
    sheet.save(args.out / "super-resolution.webp", quality=90)


def super_resolution_sheet(cascade: Cascade, pictures: Sequence[np.ndarray], captions: Sequence[str]) -> Image.Image:
    """Columns: the 64 px picture, bicubic, stage II, truth. Prints the mean error of both enlargements."""
    stage, default = cascade.stages[1], cascade.defaults[1]
    size = stage.unet_config.sample_size
    truth = np.stack(pictures).astype(np.float32) / 127.5 - 1
    low = augment.downsample(jnp.asarray(truth), cascade.stages[0].unet_config.sample_size)
    states = cascade.embed([*captions, ""])
    inputs = StageInputs(states[:-1], np.broadcast_to(states[-1:], states[:-1].shape), low)
    keys = jax.random.split(jax.random.key(0), len(captions))
    ours = finish_stage(*begin_stage(stage, stage_settings("II", stage, default, None), keys, inputs))
    small = [to_pil(image) for image in np.asarray(low)]
    bicubic = [picture.resize((size, size), 3) for picture in small]
    plain = np.stack([np.asarray(picture, np.float32) / 127.5 - 1 for picture in bicubic])
    print(f"RMS error on [-1, 1]: bicubic {_rms(plain, truth):.4f}, stage II {_rms(np.asarray(ours), truth):.4f}")
    columns = (
        [picture.resize((size, size), 0) for picture in small],
        bicubic,
        [to_pil(image) for image in np.asarray(ours)],
        [to_pil(image) for image in truth],
    )
    return grid([picture for row in zip(*columns, strict=True) for picture in row], columns=4)


def _rms(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((np.clip(a, -1, 1) - b) ** 2)))


if __name__ == "__main__":
    main()
