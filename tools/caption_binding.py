"""Does a base stage know whose colour is whose? The captions of pairs against the same with their colours swapped.

    python tools/caption_binding.py [--cascade demo] [--count 96] [--timesteps 100 250 400 800]

A picture of objects of one kind beside those of another is noised, and the stage predicts the noise twice: from the
caption, and from the caption with its two colours swapped. The same words occur in both, so a stage that knows only
which words occur is right in half of the pictures. Prints for each timestep the share in which the true caption has the
lower error, and by how much on average, for pictures of one object each and for all others; the last line is one JSON
object. Pictures are of `pairs`, of a seed that no recipe trains on, drawn at the stage's own size."""

from __future__ import annotations

import argparse
import json
import re

import jax
import jax.numpy as jnp
import numpy as np

from if_jax import Cascade
from if_jax.diffusion import process
from if_jax.inference.research import OpenStage
from if_jax.scenes import sources
from if_jax.scenes.scene import COLOURS

SEED, BATCH = 8_000_009, 32
_COLOUR = re.compile("|".join(rf"\b{colour}\b" for colour in COLOURS))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cascade", default="demo")
    parser.add_argument("--count", type=int, default=96, help="pictures of each kind")
    parser.add_argument("--timesteps", type=int, nargs="+", default=[100, 250, 400, 800])
    args = parser.parse_args()
    cascade = Cascade.load(args.cascade)
    stage, shares = cascade.stage("I"), {}
    for name, (pictures, captions) in _pictures(args.count, stage.release.unet_config.sample_size).items():
        states = cascade.embed(captions), cascade.embed([swapped(caption) for caption in captions])
        shares[name] = {t: compare(stage, pictures, *states, t) for t in args.timesteps}
        line = ", ".join(f"t {t}: {share:.2f} ({gain:+.1%})" for t, (share, gain) in shares[name].items())
        print(f"{name} ({len(captions)} pictures): {line}", flush=True)
    print(json.dumps({name: {t: share for t, (share, _) in rows.items()} for name, rows in shares.items()}))


def swapped(caption: str) -> str:
    """The caption with its two colours at each other's place, articles mended."""
    first, second = _COLOUR.findall(caption)
    text = _COLOUR.sub(lambda match: second if match[0] == first else first, caption)
    return re.sub(r"\ban?\b(?= (\w))", lambda match: "an" if match[1] in "aeiou" else "a", text)


def compare(stage: OpenStage, x0: np.ndarray, true: jax.Array, wrong: jax.Array, t: int) -> tuple[float, float]:
    """Share of pictures (B, S, S, 3) whose true caption has the lower error at timestep t, and the mean gain."""
    eps = np.random.default_rng(t).standard_normal(x0.shape, np.float32)
    at = jnp.full((len(x0),), t)
    x_t = process.add_noise(stage.schedule, jnp.asarray(x0), at, jnp.asarray(eps))
    errors = []
    for states in (true, wrong):
        predicted = [
            stage.predict(x_t[i : i + BATCH], at[i : i + BATCH], states[i : i + BATCH])[0]
            for i in range(0, len(x0), BATCH)
        ]
        errors.append(np.mean(np.square(np.concatenate(predicted) - eps), axis=(1, 2, 3)))
    return round(float(np.mean(errors[0] < errors[1])), 4), round(float(np.mean(errors[1] / errors[0]) - 1), 4)


def _pictures(count: int, size: int) -> dict[str, tuple[np.ndarray, list[str]]]:
    """ "one of each" and "more": as many pictures of both, on [-1, 1], and their captions."""
    kinds: dict[str, list[tuple[np.ndarray, str]]] = {"one of each": [], "more": []}
    start = 0
    while min(len(rows) for rows in kinds.values()) < count:
        for picture, caption, _ in sources.draw("pairs", range(start, start + BATCH), SEED, size):
            if len(_COLOUR.findall(caption)) == 2:
                kinds["more" if re.search("two|three", caption) else "one of each"].append((picture, caption))
        start += BATCH
    shown = {name: list(zip(*rows[:count], strict=True)) for name, rows in kinds.items()}
    return {name: (np.stack(p).astype(np.float32) / 127.5 - 1, list(c)) for name, (p, c) in shown.items()}


if __name__ == "__main__":
    main()
