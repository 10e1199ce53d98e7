"""How often SynthEval's reader sees in generated pictures what a person sees in them.

    python tools/reader_agreement.py

docs/assets/hand_labelled.webp holds 100 pictures that stage I of a demo cascade drew, ten in a row. hand_labelled.json
beside it says for each what a person saw, without knowing the caption or what the reader had: colour and shape of every
object, null where the person could not tell. The last line is JSON, shares with 95 % intervals:

    agreement     pictures with as many objects, read as labelled wherever the person was sure
    number        pictures with as many objects
    strict        pictures read as labelled in everything: unsure where the person was, too
    colour, shape of the attributes the person was sure of in those pictures, the share that is read alike
    unsure        of the shapes the person could not tell, the share that the reader could not tell either
"""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import numpy as np
from PIL import Image

from if_jax.evaluation.statistics import share_of
from if_jax.evaluation.synth import reading

ASSETS = Path(__file__).parents[1] / "docs/assets"
Label = tuple[str | None, str | None]  # colour and shape of an object
Pair = tuple[Label, Label]  # as labelled, as read


def main() -> None:
    """Prints every picture that is not read as labelled, then the shares."""
    labels, seen = load()
    rows: dict[str, list[bool]] = {name: [] for name in ("agreement", "number", "strict", "colour", "shape", "unsure")}
    for i, (label, read) in enumerate(zip(labels, seen, strict=True)):
        hits_by_share = compare(label, read)
        for name, hits in hits_by_share.items():
            rows[name] += hits
        if not hits_by_share["agreement"][0]:
            print(f"{i:3}  labelled {_describe(label)}; read {_describe(read)}")
    print(
        json.dumps({"pictures": len(labels)} | {k: v for name in rows for k, v in share_of(rows[name], name).items()})
    )


def load() -> tuple[list[list[Label]], list[list[Label]]]:
    """What a person saw in each of the pictures, and what the reader sees."""
    known = json.loads((ASSETS / "hand_labelled.json").read_text())["pictures"]
    sheet = np.asarray(Image.open(ASSETS / "hand_labelled.webp").convert("RGB"))
    size = reading.PIXELS
    tiles = sheet.reshape(sheet.shape[0] // size, size, -1, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
    seen = reading.read(tiles[: len(known)].astype(np.float32) / 127.5 - 1)
    labels = [[tuple(o) for o in picture["objects"]] for picture in known]
    return labels, [[(o.colour, o.shape) for o in objects] for objects in seen]


def compare(label: list[Label], read: list[Label]) -> dict[str, list[bool]]:
    """What one picture adds to each share."""
    if len(label) != len(read):
        return {"agreement": [False], "number": [False], "strict": [False]}
    pairs = max((list(zip(label, order, strict=True)) for order in permutations(read)), key=_alike)
    sure = {name: [a[k] == b[k] for a, b in pairs if a[k]] for k, name in enumerate(("colour", "shape"))}
    return sure | {
        "agreement": [all(sure["colour"] + sure["shape"])],
        "number": [True],
        "strict": [all(a == b for a, b in pairs)],
        "unsure": [b[1] is None for a, b in pairs if a[1] is None],
    }


def _alike(pairs: list[Pair]) -> tuple[int, int]:
    """How well a pairing fits: in what the person was sure of first, then in everything."""
    parts = [(a[k], b[k]) for a, b in pairs for k in (0, 1)]
    return sum(a == b for a, b in parts if a), sum(a == b for a, b in parts)


def _describe(objects: list[Label]) -> str:
    return ", ".join(f"{colour or 'unsure'} {shape or 'unsure'}" for colour, shape in objects) or "nothing"


if __name__ == "__main__":
    main()
