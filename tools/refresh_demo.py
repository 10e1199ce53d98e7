"""Makes anew everything that hangs on the demo's weights: scores, their tables, gallery, evidence sheets, sweep.

    python tools/refresh_demo.py [--prompts 420] [--only scores gallery evidence sweep] [--workdir runs/refresh]

Scores go into docs/assets/scores.json, and from there between the marks in docs/demo.md and the model card; the gallery
is what the README's own command draws. Interrupted, the same command goes on with what is not drawn yet.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from if_jax.evaluation.synth.eval_prompts import SKILLS

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "docs/assets"
PAGES = (ROOT / "docs/demo.md", ROOT / "if_jax/demo/README.md")
PARTS = ("scores", "gallery", "evidence", "sweep")
_MARKS = re.compile(r"(<!-- scores -->\n).*?(<!-- end of scores -->)", re.DOTALL)


def main() -> None:
    """Runs the parts one after another, each by its own command."""
    parser = argparse.ArgumentParser(description="Makes anew everything that hangs on the demo's weights.")
    parser.add_argument("--prompts", type=int, default=420)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--workdir", type=Path, default=Path("runs/refresh"))
    args = parser.parse_args()
    if "scores" in args.only:
        report = ASSETS / "scores.json"
        options = ["--prompts", str(args.prompts), "--out", str(args.workdir / "synth"), "--json", str(report)]
        run("-m", "if_jax", "evaluate", "--cascade", "demo", "--suite", "synth", *options)
        write_tables(json.loads(report.read_text()))
    if "gallery" in args.only:
        run("-m", *gallery_command(), str(args.workdir / "gallery"), "--overwrite")
        Image.open(args.workdir / "gallery/grid-II.png").save(ASSETS / "gallery.webp", quality=85)
    if "evidence" in args.only:
        run(str(ROOT / "tools/draw_evidence.py"))
    if "sweep" in args.only:
        run(str(ROOT / "tools/sweep.py"), "--prompts", "84", "--workdir", str(args.workdir / "sweep"))


def run(*arguments: str) -> None:
    """One command of this Python; its failure ends this one."""
    subprocess.run([sys.executable, *arguments], check=True)


def gallery_command() -> list[str]:
    """The README's command that draws the gallery, as arguments of `python -m`, up to the folder it names."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    line = next(line for line in text.splitlines() if line.startswith("if-jax dream") and "--out gallery" in line)
    return ["if_jax", *shlex.split(line)[1:-1]]


def write_tables(scores: dict[str, Any]) -> None:
    """Put the scores between the marks of each page."""
    table = score_table(scores)
    for page in PAGES:
        text, marks = _MARKS.subn(lambda match: match[1] + table + match[2], page.read_text())
        if not marks:
            raise ValueError(f"{page}: no place for the scores between <!-- scores --> and <!-- end of scores -->")
        page.write_text(text)


def score_table(scores: dict[str, Any]) -> str:
    """Every task with its interval, beside true renders."""
    rows = ["| task | demo | true renders |", "| --- | --- | --- |"]
    for name in ("overall", *SKILLS):
        key = "words_exact" if name == "words" else name
        value, interval = scores.get(key), scores.get(f"{key}_ci")
        text = "" if value is None else f"{value:.2f}" + (" ({:.2f} … {:.2f})".format(*interval) if interval else "")
        true = scores["calibration"]["true"].get(name)
        rows.append(f"| {name} | {text} | {'' if true is None else format(true, '.2f')} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
