"""What a check finds, and how the errors of the layers below become findings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

Status = Literal["pass", "warn", "fail"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report."""

    check: str
    status: Status
    told: str  # what was found
    remedy: str = ""  # what to do about it; "" where nothing is

    def line(self) -> str:
        """The finding as it is printed."""
        remedy = f" → {self.remedy}" if self.remedy else ""
        return " ".join(f"{self.status}  {self.check}: {self.told}{remedy}".split())


def refused(check: str, error: Exception, remedy: str) -> Finding:
    """A failure from an error: our own say "what is wrong: what to do"; `remedy` serves those that do not."""
    told = " ".join(str(error).split()) or type(error).__name__
    wrong, _, own = told.rpartition(": ")
    ours = isinstance(error, ValueError | FileNotFoundError) and " " in wrong and own.count("(") == own.count(")")
    return Finding(check, "fail", wrong, own) if ours else Finding(check, "fail", told, remedy)


def attempt(check: str, remedy: str, task: Callable[[], tuple[str, Any]]) -> tuple[Finding, Any]:
    """Runs a check that returns (what to tell, a value); an error is a failure, and the value None.

    Any error: a check that stumbles must not keep the others from being made.
    """
    try:
        told, value = task()
    except Exception as error:
        return refused(check, error, remedy), None
    return Finding(check, "pass", told), value
