"""Numbers and lines as plans print them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from if_jax.planning.compiling import CALIBRATED
from if_jax.planning.estimate import Time

WIDTH = 100


def value_range(time: Time, unit: str = "") -> str:
    """ "1.2 s (0.9 to 1.4)".

    Args:
      time: the three values.
      unit: behind the first.
    """
    low, high = sorted((time.best, time.worst))
    middle = f"{digits(time.middle)} {unit}".rstrip()
    return f"{middle:>10}   ({digits(low)} to {digits(high)})"


def digits(value: float) -> str:
    """Three digits, which is more than is known."""
    if value >= 1000:
        return f"{round(value, 3 - len(str(int(value)))):,.0f}"
    return f"{value:.3g}"


def wrap(text: str, indent: str, later: str | None = None) -> list[str]:
    """Lines of a page.

    Args:
      text: to be broken.
      indent: before every line but the first; with `later`, before the first.
      later: before every line but the first.
    """
    first = indent if later is not None else ""
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=later or indent, break_on_hyphens=False)


def unknowns(libtpu: str, failed: Mapping[str, str], unestimated: Mapping[str, int]) -> list[str]:
    """What a plan leaves out, and another compiler than the one that was compared.

    Args:
      libtpu: the version that was used.
      failed: blocks without figures: why.
      unestimated: operations without an estimate, by name.
    """
    rows: list[str] = []
    if libtpu != CALIBRATED:
        rows += wrap(f"WARNING: the comparison with published times was made with libtpu {CALIBRATED}.", "  ")
    if failed:
        names = "; ".join(f"{name} ({reason})" for name, reason in failed.items())
        rows += wrap(f"MISSING: the compiler failed on {len(failed)} block(s), left out of the time: {names}", "  ")
    if unestimated:
        names = ", ".join(f"{count}× {name}" for name, count in unestimated.items())
        rows += wrap(f"WITHOUT AN ESTIMATE, and so left out of the time: {names}", "  ")
    return rows
