"""How often SynthEval's reader sees in generated pictures what a person sees in them.

    python docs/reader_agreement.py

docs/hand_labelled.webp holds 100 pictures that stage I of a demo cascade drew, ten in a row; docs/hand_labelled.json
says for each what a person saw, without knowing what the reader had: colour and shape of every object, null where it
could not be told. The last line is JSON: the share of pictures read alike in everything, and in the number of objects,
their colours and their shapes alone, with 95 % intervals.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from if_jax.evaluation import reading
from if_jax.evaluation.reading import Seen
from if_jax.evaluation.scoring import share_of

FOLDER = Path(__file__).parent
Label = Sequence[Sequence[str | None]]  # (colour, shape) of each object


def main() -> None:
    """Prints every picture that is read otherwise than labelled, then the shares."""
    labels, seen = load()
    rows = {name: [] for name in ("everything", "number", "colours", "shapes")}
    for i, (label, objects) in enumerate(zip(labels, seen, strict=True)):
        same = agreement(label, objects)
        for name, hit in same.items():
            rows[name].append(hit)
        if not same["everything"]:
            print(f"{i:3}  labelled {_told(label)}; read {_told([(one.colour, one.shape) for one in objects])}")
    print(
        json.dumps({"pictures": len(labels)} | {k: v for name in rows for k, v in share_of(rows[name], name).items()})
    )


def load() -> tuple[list[Label], list[list[Seen]]]:
    """The labels, and what the reader sees."""
    known = json.loads((FOLDER / "hand_labelled.json").read_text())
    sheet = np.asarray(Image.open(FOLDER / "hand_labelled.webp").convert("RGB"))
    size = reading.PIXELS
    tiles = sheet.reshape(sheet.shape[0] // size, size, -1, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
    return known["pictures"], reading.read(tiles[: len(known["pictures"])].astype(np.float32) / 127.5 - 1)


def agreement(label: Label, seen: Sequence[Seen]) -> dict[str, bool]:
    """Whether a reading is the label: in everything, and in each thing alone."""
    told, read = [tuple(one) for one in label], [(one.colour, one.shape) for one in seen]
    parts = {"colours": 0, "shapes": 1}
    apart = {name: Counter(one[k] for one in told) == Counter(one[k] for one in read) for name, k in parts.items()}
    return {"everything": Counter(told) == Counter(read), "number": len(told) == len(read)} | apart


def _told(objects: Label) -> str:
    return ", ".join(f"{colour or 'unsure'} {shape or 'unsure'}" for colour, shape in objects) or "nothing"


if __name__ == "__main__":
    main()
