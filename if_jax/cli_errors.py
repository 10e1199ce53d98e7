"""What every command of the command line shares: a user's mistake is one line and a non-zero exit."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

_MISTAKES = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    PermissionError,
    FloatingPointError,
    MemoryError,
)


def plain_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turns what the layers below raise about a user's input into click's one line."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except _MISTAKES as error:
            raise click.ClickException(" ".join(str(error).split())) from None
        except OSError as error:  # a full disk, a broken mount
            raise click.ClickException(f"{error.strerror or error}: {error.filename or 'while writing'}") from None

    return run
