"""One page that shows everything: the scores, and every picture with what was asked and what was seen in it."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from if_jax.evaluation.synth import scoring
from if_jax.evaluation.synth.eval_prompts import OBJECT_SKILLS, SKILLS, EvalPrompt
from if_jax.evaluation.synth.reading import Seen
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


def write(
    path: Path,
    result: Mapping[str, Any],
    asks: Sequence[EvalPrompt],
    pictures: Sequence[Image.Image],
    seen: Sequence[Sequence[Seen]],
    enlarged: Mapping[int, Image.Image],
) -> None:
    """PATH is whole or not there; it needs nothing beside it. enlarged: stage II's pictures by prompt number."""
    beside = path.with_suffix(".partial")
    beside.write_text("".join(_page(result, asks, pictures, seen, enlarged)), encoding="utf-8")
    beside.replace(path)


def told(objects: Sequence[Seen]) -> str:
    """What was seen, in words: "red sphere, unsure cube"; "nothing" where there is nothing."""
    kinds = [f"{one.colour or 'unsure'} {one.shape or 'unsure'}" for one in objects]
    return ", ".join(kinds) or "nothing"


def sheet(asks: Sequence[EvalPrompt], pictures: Sequence[Image.Image], seen: Sequence[Sequence[Seen]]) -> Image.Image:
    """Eight of each task enlarged, framed green where right, a dot at every object seen, caption and reading below."""
    tiles, lines = [], []
    rows = [i for skill in SKILLS for i in [k for k, one in enumerate(asks) if one.skill == skill][:8]]
    for one, picture, objects in ((asks[i], pictures[i], seen[i]) for i in rows):
        tile = picture.resize((192, 192), Image.Resampling.NEAREST)
        pen = ImageDraw.Draw(tile)
        frame = "green" if scoring.right(one, objects) else "red"
        pen.rectangle((0, 0, 191, 191), outline=frame if one.skill != "words" else "grey", width=4)
        for other in objects:
            x, y = (192 * share for share in other.at)
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill="black", outline="white")
        tiles.append(tile)
        lines.append(f"{one.caption} > {told(objects)}")
    return grid(tiles, columns=8, captions=lines)


def _page(
    result: Mapping[str, Any],
    asks: Sequence[EvalPrompt],
    pictures: Sequence[Image.Image],
    seen: Sequence[Sequence[Seen]],
    enlarged: Mapping[int, Image.Image],
) -> Iterator[str]:
    yield f"<!doctype html><meta charset='utf-8'><title>SynthEval</title><style>{_STYLE}</style><h1>SynthEval</h1>"
    yield "<p>A picture is right (green) where the objects read in it (dots) are those asked for and no others."
    yield "</p><table><tr><th>task<th>score<th>95 %<th>unseen<th>loose rule<th>true renders<th>blurred<th>shuffled"
    unseen, loose, known = result["unseen"], result["loose"], result["calibration"]
    for name in ("overall", *OBJECT_SKILLS):
        row = [result[name], result[f"{name}_ci"], unseen[name], loose[name]]
        row += [known[kind][name] for kind in ("true", "blurred", "shuffled")]
        yield f"<tr><td>{name}" + "".join(f"<td>{html.escape(str(value))}" for value in row)
    yield f"<tr><td>words exact<td>{result['words_exact']}<td>{result['words_exact_ci']}</table>"
    for skill in SKILLS:
        yield f"<h2>{skill}</h2>"
        for i, one in enumerate(asks):
            if one.skill == skill:
                yield _figure(one, pictures[i], seen[i])
                if i in enlarged:
                    yield _figure(one, enlarged[i], ())
    yield f"<h2>Everything</h2><pre>{html.escape(json.dumps(result, indent=1))}</pre>"


def _figure(one: EvalPrompt, picture: Image.Image, objects: Sequence[Seen]) -> str:
    kind = "none" if one.skill == "words" else "right" if scoring.right(one, objects) else "wrong"
    dots = "".join(f"<i style='left:{100 * s.at[0]:.1f}%;top:{100 * s.at[1]:.1f}%'></i>" for s in objects)
    file = io.BytesIO()
    picture.save(file, "WEBP", lossless=picture.width <= 64, quality=85)
    source = base64.b64encode(file.getvalue()).decode()
    below = html.escape(one.caption) + (" <small>(unseen)</small>" if one.unseen else "")
    below += f"<br><small>{told(objects)}</small>" if picture.width <= 64 else ""
    return f"<figure class={kind}><div><img src='data:image/webp;base64,{source}'>{dots}</div>{below}</figure>"
