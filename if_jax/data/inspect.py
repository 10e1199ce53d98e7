"""What a source holds, in a few lines and on one sheet, before anyone trains on it."""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from if_jax.data.index import Filter
from if_jax.data.index_part import SCORES
from if_jax.data.preprocessing import fit
from if_jax.data.sources import Stored, UncheckedFlaw, open_stored, summarise_skipped
from if_jax.data.tfds_folder import TfdsFolder, read_note
from if_jax.scenes import sources

_COLUMNS, _THUMB, _LINES, _LINE = 6, 160, 4, 13  # of the contact sheet; pixels
_PLAIN = str.maketrans("“”‘’–—", "\"\"''--")  # what the sheet's font lacks and captions have most
_SIDES = (64, 256, 1024)  # what the three stages of a cascade need


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Prints as what a user wants to know, how much is usable first."""

    lines: tuple[str, ...]
    sheet: Image.Image  # the contact sheet

    def __str__(self) -> str:
        return "\n".join(self.lines)


def inspect(
    source: str,
    keep: Filter | None = None,
    *,
    samples: int = 24,
    exclude: str = "",
    reindex: bool = False,
    workers: int | None = None,
) -> Inspection:
    """Open a source, every picture of which is decoded when it is first indexed, and describe it.

    Args:
      source: as for training, but no mixture.
      keep: as for training; what it leaves out is counted with what is unusable.
      samples: pictures on the contact sheet, evenly spaced through the source.
      exclude: a file that lists records which are not used; they are counted as well.
      reindex: index again what has changed since it was indexed, rather than refuse it.
      workers: processes that index; None: one per core.

    Raises:
      FileNotFoundError, ValueError: one line; also where no record is usable.
    """
    if source in sources.NAMES:
        shown = [(Image.fromarray(picture), text) for picture, text, _ in sources.draw(source, range(samples), 0, 64)]
        first = f"usable without end: {source!r} is drawn on the fly, at any size"
        return Inspection((first, *_examples([text for _, text in shown])), contact_sheet(shown))
    stored = open_stored(source, keep, exclude=exclude, reindex=reindex, workers=workers)
    chosen = np.unique(np.linspace(0, len(stored) - 1, min(samples, len(stored))).astype(int))
    shown = list(_decoded(stored, chosen))
    if not shown:
        raise ValueError(
            f"no sample of {len(chosen)} of {source!r} can be decoded, and it was indexed by heads alone: `if-jax data "
            "index --check decode` leaves out what is damaged"
        )
    lost = [f"{len(chosen) - len(shown)} of {len(chosen)} samples cannot be decoded"] * (len(shown) < len(chosen))
    return Inspection((*describe(stored), *lost, *_examples([text for _, text in shown])), contact_sheet(shown))


def _decoded(stored: Stored, numbers: Iterable[int]) -> Iterator[tuple[Image.Image, str]]:
    """Pictures and captions, without those that were thought sound by their heads."""
    for number in numbers:
        try:
            record, picture = stored.decode(int(number))
        except UncheckedFlaw:
            continue
        yield picture, record.captions[0]


def contact_sheet(pictures: Iterable[tuple[Image.Image, str]]) -> Image.Image:
    """Pictures in rows of six, each cut square, with its caption below."""
    cells = [_cell(picture, caption) for picture, caption in pictures]
    rows = -(-len(cells) // _COLUMNS)
    width, height = cells[0].size
    sheet = Image.new("RGB", (min(len(cells), _COLUMNS) * width, rows * height), "white")
    for place, cell in enumerate(cells):
        sheet.paste(cell, (place % _COLUMNS * width, place // _COLUMNS * height))
    return sheet


def _cell(picture: Image.Image, caption: str) -> Image.Image:
    margin = 6
    cell = Image.new("RGB", (_THUMB + 2 * margin, _THUMB + 2 * margin + _LINES * _LINE), "white")
    side = min(*picture.size, _THUMB)
    enlarged = fit(picture, side).resize((_THUMB, _THUMB), Image.Resampling.NEAREST)
    cell.paste(enlarged, (margin, margin))
    lines = textwrap.wrap(caption.translate(_PLAIN).encode("latin-1", "replace").decode("latin-1"), 28)[:_LINES]
    pen, font = ImageDraw.Draw(cell), ImageFont.load_default(size=10)
    for number, line in enumerate(lines):
        pen.text((margin, _THUMB + margin + 2 + number * _LINE), line, fill="black", font=font)
    return cell


def describe(stored: Stored) -> list[str]:
    """How many records are usable, their sizes, captions and scores, and what is left out and why: a line each."""
    width, height, length = (stored.facts(field) for field in ("width", "height", "caption"))
    sides, lost = np.minimum(width, height), sum(skipped.total for skipped in stored.skipped.values())
    large = ", ".join(f"{int((sides >= side).sum())} of at least {side} px" for side in _SIDES)
    return [
        f"usable {len(stored)} of {len(stored) + lost} records in {stored.name}{_origin(stored)}",
        f"sizes: short side {sides.min()} to {sides.max()} px; {large}; "
        f"longest {np.max(np.maximum(width, height) / sides):.2f} times its width",
        f"captions: {length.min()} to {length.max()} characters, half of them up to {int(np.median(length))}",
        *_scores(stored),
        *summarise_skipped(stored.skipped),
    ]


def _origin(stored: Stored) -> str:
    store, count = stored.stores[0], len(stored.stores)
    note = read_note(store.path) if isinstance(store, TfdsFolder) else {}
    if not note:
        return f" ({count} {store.kind}{'s' if count > 1 else ''})"
    skipped = sum(map(len, note["skipped"].values()))
    seed = f", seed {note['seed']}" if note["seed"] is not None else ""
    return f" ({note['kind']}, {note['size']} px{seed}" + (f"; {skipped} left out when built)" if skipped else ")")


def _scores(stored: Stored) -> list[str]:
    lines = []
    for name in SCORES:
        values = stored.facts(name)
        known = values[~np.isnan(values)]
        if len(known):
            low, middle, high = np.quantile(known, (0.0, 0.5, 1.0))
            lines.append(f"{name}: {len(known)} known, {low:.3g} to {high:.3g}, half of them up to {middle:.3g}")
    return lines


def _examples(captions: list[str]) -> list[str]:
    return [f"  {textwrap.shorten(caption, 160)}" for caption in itertools.islice(captions, 5)]
