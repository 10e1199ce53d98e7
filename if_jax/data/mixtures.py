"""What `data.source` names: one source, or several with their weights."""

from __future__ import annotations

import re

from if_jax.data import patterns
from if_jax.scenes import sources

_WEIGHTED = re.compile(r"\s*(\d+(?:\.\d+)?)\s*\*\s*(\S.*?)\s*")


def parse_mixture(source: str) -> list[tuple[float, str]]:
    """ "0.7*scenes + 0.3*data/mine" as weights and names; a single name has weight 1.

    What exists is no mixture, whatever its name, and neither is a pattern (`2*.tar`).

    Raises:
      ValueError: a term has no weight, or one that is not above 0.
    """
    one_term = " + " not in str(source) or patterns.exists(str(source))
    terms = [str(source)] if one_term else str(source).split(" + ")
    matches = [_WEIGHTED.fullmatch(term) for term in terms]
    if len(matches) == 1 and (not matches[0] or _is_pattern(*matches[0].group(0, 2))):
        return [(1.0, str(source))]
    parts = [(float(match[1]), match[2]) for match in matches if match]
    if len(parts) < len(matches) or not all(weight > 0 for weight, _ in parts):
        raise ValueError(f"mixture {source!r}: write it as WEIGHT*SOURCE + WEIGHT*SOURCE, weights above 0")
    return parts


def _is_pattern(term: str, name: str) -> bool:
    """Whether "2*.tar" means files whose names begin with a 2, rather than a source with a weight."""
    return patterns.matches_files(term) or (name.startswith(".") and name.split("/")[0] not in (".", ".."))


def stored_parts(source: str) -> list[str]:
    """Those parts of a source that are stored rather than drawn."""
    return [name for _, name in parse_mixture(source) if name not in sources.NAMES]
