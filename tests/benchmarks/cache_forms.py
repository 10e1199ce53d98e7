"""What the two forms of an embedding cache cost and change, on a cascade's own text encoder and stage I.

    python tests/benchmarks/cache_forms.py [--cascade demo] [--captions 256] [--shown 8]

Prints bytes per caption as written, and how far off the compact form is (root mean square error over root mean square):
of the text states, tokens and padding apart, and of the noise that stage I predicts from them. Beside that stands what
bfloat16, in which both forms are kept, and what another caption changes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from if_jax import Cascade
from if_jax.checkpoints.stages import Encoders, TextEncoder
from if_jax.data import embed, embeddings, sources
from if_jax.data.builders import build
from if_jax.data.preprocessing import Preparation
from if_jax.parallel import mesh, rules

TIMESTEPS = (900, 600, 300, 50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cascade", default="demo")
    parser.add_argument("--captions", type=int, default=256)
    parser.add_argument("--shown", type=int, default=8, help="captions whose pictures stage I predicts")
    args = parser.parse_args()
    cascade = Cascade.load(args.cascade, stages=1)
    base = cascade.stages[0]
    text = TextEncoder(base.text_config, base.text_params, base.tokenizer, base.text_encoder_sha256)
    states = {}
    with tempfile.TemporaryDirectory() as work:
        build("scenes", Path(work) / "scenes", count=args.captions, size=16)
        stored = sources.open_stored(str(Path(work) / "scenes"))
        for form in embeddings.FORMS:
            out = Path(work) / form
            how = {"preparation": Preparation(), "sharding_rules": rules.PRESETS["dp"], "batch_size": 16}
            embed.embed(stored, Encoders(text), out, form=form, mesh=mesh.make_mesh(), **how)
            cache = embeddings.Embeddings(out)
            captions = [stored[number].captions[0] for number in range(len(stored))]
            rows = [cache.states(number, 0, caption) for number, caption in enumerate(captions)]
            states[form] = np.stack(rows).astype(np.float32)
            told = {"form": form, "width": base.text_config.d_model, "captions": len(stored)}
            print(json.dumps(told | {"bytes_per_caption": round(cache.note["bytes_per_caption"])}))
    _, mask = text.tokenizer(captions)
    real = mask.astype(bool)
    exact, compact = states["exact"], states["compact"]
    print(
        json.dumps(
            {"states": {"tokens": _error(exact[real], compact[real]), "padding": _error(exact[~real], compact[~real])}}
        )
    )
    unrounded = cascade.embed(captions[: args.shown], clean_caption=False)
    stage, rng = cascade.stage("I"), np.random.default_rng(0)
    for t in TIMESTEPS:
        x_t = rng.standard_normal((args.shown, base.unet_config.sample_size, base.unet_config.sample_size, 3))
        x_t, steps = x_t.astype(np.float32), np.full(args.shown, t, np.int32)
        of = lambda given: np.asarray(stage.predict(x_t, steps, given[: args.shown])[0])  # noqa: E731, B023
        whole = of(exact)
        told = {"compact": _error(whole, of(compact)), "bfloat16": _error(of(unrounded), whole)}
        told["another_caption"] = _error(whole, of(np.roll(exact[: args.shown], 1, axis=0)))
        print(json.dumps({"timestep": t, "prediction": told}))


def _error(true: np.ndarray, other: np.ndarray) -> float:
    """Root mean square difference over root mean square."""
    return float(f"{np.sqrt(np.square(true - other).mean() / np.square(true).mean()):.3g}")


if __name__ == "__main__":
    main()
