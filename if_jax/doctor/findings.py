"""What a check says, and how the errors of the layers below become findings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, TypeVar

T = TypeVar("T")
Status = Literal["pass", "warn", "fail"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of what the doctor says."""

    check: str
    status: Status
    message: str  # what the check has seen
    remedy: str = ""  # what to do about it; "" where nothing is

    def line(self) -> str:
        """The finding as it is printed."""
        remedy = f" → {self.remedy}" if self.remedy else ""
        return " ".join(f"{self.status}  {self.check}: {self.message}{remedy}".split())

    def as_json(self) -> dict[str, str]:
        """The finding as `if-jax doctor --json` gives it."""
        return {"check": self.check, "status": self.status, "message": self.message, "remedy": self.remedy}


def failure(check: str, error: Exception, remedy: str) -> Finding:
    """A finding from an error.

    Args:
      check: what was looked at.
      error: ours say "what is wrong: what to do", which becomes message and remedy.
      remedy: for errors of others, which do not.
    """
    message = " ".join(str(error).split()) or type(error).__name__
    wrong, _, own = message.rpartition(": ")
    ours = isinstance(error, ValueError | FileNotFoundError) and " " in wrong and own.count("(") == own.count(")")
    return Finding(check, "fail", wrong, own) if ours else Finding(check, "fail", message, remedy)


def attempt(check: str, remedy: str, task: Callable[[], tuple[str, T]]) -> tuple[Finding, T | None]:
    """Runs a check; any error is a failure, so that a check that stumbles does not keep the others from being made.

    Args:
      check: what is looked at.
      remedy: for errors that name none.
      task: returns (the message of a pass, a value).

    Returns:
      The finding, and the task's value, None after an error.
    """
    try:
        message, value = task()
    except Exception as error:
        return failure(check, error, remedy), None
    return Finding(check, "pass", message), value
