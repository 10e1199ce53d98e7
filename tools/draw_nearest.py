"""Shows the training pictures nearest to what a cascade draws: whether it draws or remembers.

    python tools/draw_nearest.py [--cascade demo] [--seed 7] [--out docs/assets]

Writes OUT/nearest.webp: in each row a picture of stage I for an unseen prompt, the prompts being the first of
`draw_evidence.py`, then the five nearest pictures, with their captions, of all that the last leg of its training saw.
Those are not stored anywhere: the recipe in the weight file names source, seed and count, and training's own pipeline
makes them again.
Near is the root-mean-square difference of pixels on [-1, 1]. Printed beside the mean distance of the drawn pictures is
that of true renders of the same prompts, which no training picture can have been copied to.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from if_jax import Cascade
from if_jax.config import to_recipe
from if_jax.data import pipeline
from if_jax.data.inspect import contact_sheet
from if_jax.scenes import sources

ASSETS = Path(__file__).parents[1] / "docs/assets"
COUNT, ROWS, NEAREST, CHUNK = 64, 6, 5, 480


def main() -> None:
    """Draws, looks through the training pictures, writes the sheet and prints one JSON line of distances."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cascade", default="demo")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ASSETS)
    args = parser.parse_args()
    cascade = Cascade.load(args.cascade)
    stage = cascade.stages[0]
    recipe, seen = to_recipe(json.loads(stage.notes["recipe"])), int(stage.notes["step"])
    data, count = recipe.data, seen * recipe.batch_size
    scenes = list(sources.draw("tasks", range(COUNT), args.seed, data.size))
    captions = [caption for _, caption, _ in scenes]
    ours = cascade.dream(captions, seed=args.seed, batch_size=8, stages=1)["I"]
    asked = np.concatenate([flat([np.asarray(image) for image in ours]), flat([picture for picture, _, _ in scenes])])
    source = pipeline.open_source(data.source, data.size, data.seed, data.preparation, data.keep)
    distances, kept = nearest(asked, source, count)
    cells = []
    for row in range(ROWS):
        cells.append((ours[row], captions[row]))
        cells += [
            (Image.fromarray(picture), f"{distance:.2f} {caption}")
            for distance, picture, caption in kept[row][:NEAREST]
        ]
    contact_sheet(cells).save(args.out / "nearest.webp", quality=90)
    report = {"training_pictures": count, "drawn": distances[:COUNT], "true": distances[COUNT:]}
    means = {name: round(float(np.mean(value)), 4) for name, value in report.items() if name != "training_pictures"}
    print(json.dumps({"training_pictures": count, **means, "least_drawn": round(float(min(report["drawn"])), 4)}))


def nearest(
    asked: np.ndarray, source: pipeline.Source, count: int
) -> tuple[list[float], list[list[tuple[float, np.ndarray, str]]]]:
    """What of the first `count` pictures of `source` is nearest to each row of `asked` (N, pixels).

    Returns the least distances, and for each row the nearest as (distance, picture, caption), nearest first.
    """
    kept: list[list[tuple[float, np.ndarray, str]]] = [[] for _ in asked]
    norms = np.sum(asked**2, axis=1)
    for start in tqdm(range(0, count, CHUNK), desc="training pictures", unit="chunk"):
        chunk = source.read(range(start, min(start + CHUNK, count)))
        theirs = flat([sample.image for sample in chunk])
        squares = norms[:, None] + np.sum(theirs**2, axis=1) - 2 * asked @ theirs.T
        far = np.sqrt(np.maximum(squares, 0) / asked.shape[1])
        for row, line in enumerate(far):
            for place in np.argsort(line)[:NEAREST]:
                kept[row].append((float(line[place]), chunk[place].image, chunk[place].caption))
            kept[row] = sorted(kept[row], key=lambda match: match[0])[:NEAREST]
    return [matches[0][0] for matches in kept], kept


def flat(pictures: list[np.ndarray]) -> np.ndarray:
    """(N, pixels) float32 on [-1, 1] of uint8 pictures."""
    return np.stack(pictures).reshape(len(pictures), -1).astype(np.float32) / 127.5 - 1


if __name__ == "__main__":
    main()
