"""Shows the training pictures nearest to what a cascade draws: whether it draws or remembers.

    python docs/draw_nearest.py [--cascade demo] [--seed 7] [--out docs]

Writes OUT/nearest.webp: in each row a picture of stage I for an unseen prompt, the prompts being the first of
`draw_evidence.py`, then the five nearest pictures, with their captions, of all that the last leg of its training saw.
Those are not stored anywhere: the recipe in the weight file names source, seed and count, and they are drawn again.
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
from if_jax.data import drawn
from if_jax.data.inspect import contact_sheet

COUNT, ROWS, NEAREST, CHUNK = 64, 6, 5, 480


def main() -> None:
    """Draws, looks through the training pictures, writes the sheet and prints one JSON line of distances."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cascade", default="demo")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    cascade = Cascade.load(given.cascade)
    stage = cascade.stages[0]
    recipe, seen = json.loads(stage.notes["recipe"]), int(stage.notes["step"])
    data, count = recipe["data"], seen * recipe["batch_size"] * recipe["accumulate"]
    if data["source"] not in drawn.NAMES:
        raise SystemExit(
            f"{given.cascade} was trained on {data['source']}: only {', '.join(drawn.NAMES)} can be redrawn"
        )
    scenes = list(drawn.draw("tasks", range(COUNT), given.seed, data["size"]))
    captions = [caption for _, caption, _ in scenes]
    ours = cascade.dream(captions, seed=given.seed, batch_size=8, stages=1)["I"]
    asked = np.concatenate([flat([np.asarray(image) for image in ours]), flat([picture for picture, _, _ in scenes])])
    distances, kept = nearest(asked, data["source"], data["seed"], data["size"], count)
    cells = []
    for row in range(ROWS):
        cells.append((ours[row], captions[row]))
        cells += [
            (Image.fromarray(picture), f"{distance:.2f} {caption}")
            for distance, picture, caption in kept[row][:NEAREST]
        ]
    contact_sheet(cells).save(given.out / "nearest.webp", quality=90)
    report = {"training_pictures": count, "drawn": distances[:COUNT], "true": distances[COUNT:]}
    told = {name: round(float(np.mean(value)), 4) for name, value in report.items() if name != "training_pictures"}
    print(json.dumps({"training_pictures": count, **told, "least_drawn": round(float(min(report["drawn"])), 4)}))


def nearest(
    asked: np.ndarray, source: str, seed: int, size: int, count: int
) -> tuple[list[float], list[list[tuple[float, np.ndarray, str]]]]:
    """For each row of `asked` (N, pixels) the least distance, and the nearest (distance, picture, caption) first."""
    kept: list[list[tuple[float, np.ndarray, str]]] = [[] for _ in asked]
    norms = np.sum(asked**2, axis=1)
    for start in tqdm(range(0, count, CHUNK), desc="training pictures", unit="chunk"):
        chunk = list(drawn.draw(source, range(start, min(start + CHUNK, count)), seed, size))
        theirs = flat([picture for picture, _, _ in chunk])
        squares = norms[:, None] + np.sum(theirs**2, axis=1) - 2 * asked @ theirs.T
        far = np.sqrt(np.maximum(squares, 0) / asked.shape[1])
        for row, line in enumerate(far):
            for place in np.argsort(line)[:NEAREST]:
                picture, caption, _ = chunk[place]
                kept[row].append((float(line[place]), picture, caption))
            kept[row] = sorted(kept[row], key=lambda found: found[0])[:NEAREST]
    return [found[0][0] for found in kept], kept


def flat(pictures: list[np.ndarray]) -> np.ndarray:
    """(N, pixels) float32 on [-1, 1] of uint8 pictures."""
    return np.stack(pictures).reshape(len(pictures), -1).astype(np.float32) / 127.5 - 1


if __name__ == "__main__":
    main()
