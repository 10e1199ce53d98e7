"""One page that shows everything: the scores, and every picture with its prompt and what was seen in it."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

from if_jax.checkpoints.files import atomic_file
from if_jax.evaluation.synth import scoring
from if_jax.evaluation.synth.eval_prompts import OBJECT_SKILLS, SKILLS, EvalPrompt
from if_jax.evaluation.synth.reading import DetectedObject
from if_jax.inference.pictures import grid

_STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:2em auto;max-width:75em;padding:0 1em;color:#222;background:#fff}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:left}
figure{display:inline-block;width:136px;margin:4px;vertical-align:top;font-size:11px}
figure div{position:relative;width:128px;height:128px;border:4px solid #c33}figure.right div{border-color:#2a2}
figure img{width:128px;height:128px;image-rendering:pixelated}figure.none div{border-color:#999}
i{position:absolute;width:8px;height:8px;margin:-5px;border:1px solid #fff;border-radius:9px;background:#000}
small{color:#666}pre{background:#f6f6f6;padding:1em;overflow:auto}
"""


class RatedPicture(NamedTuple):
    """One prompt with what was drawn for it and what was seen in that."""

    prompt: EvalPrompt
    picture: Image.Image  # stage I's
    objects: Sequence[DetectedObject]
    enlarged: Image.Image | None  # stage II's, where it drew one


def write(path: Path, result: Mapping[str, Any], rows: Sequence[RatedPicture]) -> None:
    """Write the page, which needs no file beside it.

    Args:
      path: of the HTML file.
      result: the report, as JSON values.
      rows: every prompt.
    """
    with atomic_file(path) as beside:
        beside.write_text("".join(_page(result, rows)), encoding="utf-8")


def list_objects(objects: Sequence[DetectedObject]) -> str:
    """What was seen, in words: "red sphere, unsure cube"; "nothing" where there is nothing."""
    return ", ".join(f"{item.colour or 'unsure'} {item.shape or 'unsure'}" for item in objects) or "nothing"


def sheet(rows: Sequence[RatedPicture]) -> Image.Image:
    """Eight of each task enlarged, framed green where right, a dot at every object seen, caption and reading below."""
    tiles, lines = [], []
    for row in (row for skill in SKILLS for row in [row for row in rows if row.prompt.skill == skill][:8]):
        tile = row.picture.resize((192, 192), Image.Resampling.NEAREST)
        pen = ImageDraw.Draw(tile)
        pen.rectangle((0, 0, 191, 191), outline={"right": "green", "wrong": "red"}.get(_verdict(row), "grey"), width=4)
        for item in row.objects:
            x, y = (192 * share for share in item.at)
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill="black", outline="white")
        tiles.append(tile)
        lines.append(f"{row.prompt.caption} > {list_objects(row.objects)}")
    return grid(tiles, columns=8, captions=lines)


def _verdict(row: RatedPicture) -> str:
    """Whether a picture is "right" or "wrong"; "none" where words decide."""
    if row.prompt.skill == "words":
        return "none"
    return "right" if scoring.is_right(row.prompt, row.objects) else "wrong"


def _page(result: Mapping[str, Any], rows: Sequence[RatedPicture]) -> Iterator[str]:
    yield f"<!doctype html><meta charset='utf-8'><title>SynthEval</title><style>{_STYLE}</style><h1>SynthEval</h1>"
    yield "<p>A picture is right (green) where the objects read in it (dots) are those asked for and no others."
    yield "</p><table><tr><th>task<th>score<th>95 %<th>unseen<th>loose rule<th>true renders<th>blurred<th>shuffled"
    unseen, loose, known = result["unseen"], result["loose"], result["calibration"]
    for name in ("overall", *OBJECT_SKILLS):
        values = [result[name], result[f"{name}_ci"], unseen[name], loose[name]]
        values += [known[kind][name] for kind in ("true", "blurred", "shuffled")]
        yield f"<tr><td>{name}" + "".join(f"<td>{html.escape(str(value))}" for value in values)
    yield f"<tr><td>words exact<td>{result['words_exact']}<td>{result['words_exact_ci']}</table>"
    for skill in SKILLS:
        yield f"<h2>{skill}</h2>"
        for row in rows:
            if row.prompt.skill == skill:
                yield _figure(row)
                if row.enlarged is not None:
                    yield _figure(row._replace(picture=row.enlarged, objects=()))
    yield f"<h2>Everything</h2><pre>{html.escape(json.dumps(result, indent=1))}</pre>"


def _figure(row: RatedPicture) -> str:
    picture, prompt = row.picture, row.prompt
    dots = "".join(f"<i style='left:{100 * s.at[0]:.1f}%;top:{100 * s.at[1]:.1f}%'></i>" for s in row.objects)
    file = io.BytesIO()
    picture.save(file, "WEBP", lossless=picture.width <= 64, quality=85)
    source = base64.b64encode(file.getvalue()).decode()
    below = html.escape(prompt.caption) + (" <small>(unseen)</small>" if prompt.unseen else "")
    below += f"<br><small>{list_objects(row.objects)}</small>" if picture.width <= 64 else ""
    return f"<figure class={_verdict(row)}><div><img src='data:image/webp;base64,{source}'>{dots}</div>{below}</figure>"
