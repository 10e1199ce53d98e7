"""The pages in docs/ as a site: built strictly, and nothing in it is fetched from anywhere else."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.documents

ROOT = Path(__file__).parent.parent
# What a browser fetches by itself, unlike the target of a link.
_FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|video)\b[^>]*?\bsrc=["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|<link\b(?=[^>]*\brel=["']?(?:stylesheet|icon|preload|preconnect|modulepreload))[^>]*?\bhref=["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|(?:url\(|@import\s+)["']?((?:https?:)?//[^"'\s)]+)"""
)


def fetched(text: str) -> list[str]:
    """The addresses on other sites that a page or style sheet fetches from."""
    return [next(filter(None, match)) for match in _FETCHED.findall(text)]


def test_the_site_is_built_strictly_and_asks_nothing_of_other_sites(tmp_path):
    pytest.importorskip("material", reason="pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".html", ".css")]
    assert len(files) > 15
    outside = {str(path.relative_to(tmp_path)): fetched(path.read_text(encoding="utf-8")) for path in files}
    assert not {name: addresses for name, addresses in outside.items() if addresses}
    assert not any('class="mermaid"' in path.read_text(encoding="utf-8") for path in files)  # its script is elsewhere
    recipe = (tmp_path / "reference/recipe.html").read_text(encoding="utf-8")
    assert "side of the pictures, pixels" in recipe  # what stands at a key in config/keys.py


def test_what_is_fetched_is_seen():
    link = '<a href="https://a.org">a</a><link rel="canonical" href="https://a.org">'
    assert fetched(link + '<script src="assets/a.js"></script><img src="data:image/png;base64,//a.org">') == []
    page = '<script async src="https://b.org/x.js"></script><link href="//c.org/f.css" rel="stylesheet">'
    assert fetched(page + "@import url(https://d.org/f.css)") == [
        "https://b.org/x.js",
        "//c.org/f.css",
        "https://d.org/f.css",
    ]
