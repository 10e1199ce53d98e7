"""Each kind of stage learns 16 pictures by heart and draws them again: the objective, sampler and data at work.

    python tools/overfit.py [--steps 600] [--frames 600] [--out docs/assets] [--workdir DIR]

Writes OUT/overfit-base.webp and OUT/overfit-super-resolution.webp: in every pair the training picture and what the
stage draws from its caption alone, or from its small version. The recipes are those of the demo cascade, on a data set
of 16 scenes, starting from the demo's weights: it has never seen these. Super-resolution learns whole frames, as it
draws them (norms find other statistics in crops), at half the demo's size: 32 → 128 px, a quarter of the work.
Interrupted, the same command with the same --workdir goes on.
"""

from __future__ import annotations

import argparse
import json
import runpy
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from if_jax import Cascade
from if_jax.config import to_recipe
from if_jax.data import builders
from if_jax.inference.cascade import DEMO
from if_jax.inference.denoise_stage import begin_stage, finish_stage
from if_jax.inference.pictures import grid, to_pil
from if_jax.inference.settings import stage_settings
from if_jax.inference.stage_inputs import StageInputs
from if_jax.scenes import grammar, raycast, sampling
from if_jax.scenes.scene import as_numpy
from if_jax.training.loop import train
from if_jax.training.publish import publish

ASSETS = Path(__file__).parents[1] / "docs/assets"
COUNT, SEED = 16, 16
CONFIGS = Path(__file__).parent.parent / "configs"


def main() -> None:
    """Trains both stages, draws the pictures again and prints one JSON line: losses, and errors in PSNR."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="updates of the base stage, 8 pictures each")
    parser.add_argument(
        "--frames", type=int, default=600, help="updates of the super-resolution stage, 2 pictures each"
    )
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--workdir", type=Path)
    args = parser.parse_args()
    work = args.workdir or Path(tempfile.mkdtemp(prefix="overfit-"))
    drawn = sampling.sample_scenes(np.arange(COUNT), SEED)
    captions = [grammar.caption(s, np.random.default_rng((SEED, i))) for i, s in enumerate(as_numpy(drawn))]
    base, sr, cascade = work / "I", work / "II", work / "cascade"
    learn("demo_base", base, 64, args.steps, batch_size=8, init_from=str(DEMO / "stage_I"))
    publish([str(base)], str(cascade), overwrite=True)
    encoder = str(cascade / "stage_I")
    start = {"init_from": str(DEMO / "stage_II"), "text_encoder_from": encoder}
    learn("demo_sr", sr, 128, args.frames, batch_size=2, low_size=32, rate=3e-4, **start)
    publish([str(base), str(sr)], str(cascade), overwrite=True)
    opened = Cascade.load(cascade)
    small, large = (list(np.asarray(raycast.render_scenes(drawn, size))) for size in (64, 128))
    low = [image.resize((32, 32), Image.Resampling.BICUBIC) for image in _pil(large)]  # as in training
    settings = {"guidance_scale": 1.0, "sample_timestep_respacing": "smart50"}
    again = opened.dream(captions, stages=1, if_I_kwargs=settings)["I"]
    pairs(_pil(small), again, 2).save(args.out / "overfit-base.webp", quality=90)
    enlarged = enlarge(opened, low, captions, 128)
    pairs(_pil(large), enlarged).save(args.out / "overfit-super-resolution.webp", quality=90)
    bicubic = [image.resize((128, 128), Image.Resampling.BICUBIC) for image in low]
    report = {"base": losses(base), "super_resolution": losses(sr)}
    report |= {"base_psnr": psnr(again, small), "super_resolution_psnr": psnr(enlarged, large)}
    print(json.dumps(report | {"bicubic_psnr": psnr(bicubic, large)}))


def learn(
    name: str, workdir: Path, size: int, steps: int, *, low_size: int = 64, rate: float = 1e-3, **changed: Any
) -> None:
    """Trains a demo recipe on the 16 scenes."""
    data = workdir.parent / f"data-{size}"
    if not data.exists():
        builders.build("scenes", data, count=COUNT, size=size, seed=SEED)
    config = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()
    config.update(changed)
    config.steps, config.ema_decays = steps, (0.99,)
    config.data.source, config.data.size, config.data.low_size = str(data), size, low_size
    config.data.caption_dropout, config.data.crop = 0.0, 0
    config.optimizer.learning_rate = rate
    config.optimizer.warmup_steps, config.checkpoint_every, config.sample.every = 50, 100, 0
    train(to_recipe(config), str(workdir))


def enlarge(cascade: Cascade, low: list[Image.Image], captions: list[str], size: int) -> list[Image.Image]:
    """What stage II draws from the small pictures without noise on them, at another size than its release says."""
    stage = cascade.stages[1]
    settings = stage_settings("II", stage, cascade.defaults[1], {"guidance_scale": 1.0, "aug_level": 0.0})
    states = cascade.embed([*captions, ""])
    low_res = jnp.asarray(np.stack([np.asarray(image, np.float32) for image in low]) / 127.5 - 1)
    inputs = StageInputs(states[:-1], np.broadcast_to(states[-1:], states[:-1].shape), low_res)
    keys = jax.random.split(jax.random.key(0), len(captions))
    pictures = finish_stage(*begin_stage(stage, settings, keys, inputs, size=(size, size)))
    return [to_pil(picture) for picture in np.asarray(pictures)]


def pairs(truth: list[Image.Image], drawn: list[Image.Image], scale: int = 1) -> Image.Image:
    """Training picture and drawn picture side by side, four pairs in a row."""
    sheet = grid([image for pair in zip(truth, drawn, strict=True) for image in pair], columns=8)
    return sheet.resize((scale * sheet.width, scale * sheet.height), 0)


def losses(workdir: Path) -> list[float]:
    """The first and the last loss in the metrics of a run."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    values = [row["loss"] for row in rows if "loss" in row]
    return [round(values[0], 4), round(values[-1], 4)]


def psnr(drawn: list[Image.Image], truth: list[np.ndarray]) -> float:
    """Mean over the pictures, decibels."""
    errors = [np.mean((np.asarray(a, np.float64) - b) ** 2) for a, b in zip(drawn, truth, strict=True)]
    return round(float(np.mean(10 * np.log10(255**2 / np.array(errors)))), 2)


def _pil(pictures: list[np.ndarray]) -> list[Image.Image]:
    return [Image.fromarray(picture) for picture in pictures]


if __name__ == "__main__":
    main()
