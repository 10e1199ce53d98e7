"""What every command of the command line shares: a mistake is one line, and compiled programs are kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
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
    """Decorates a command: what the layers below raise about a user's input becomes click's one line.

    Args:
      command: the function behind a command.

    Returns:
      The same, which raises `click.ClickException` in place of those errors.
    """

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except _MISTAKES as error:
            raise click.ClickException(" ".join(str(error).split())) from None
        except OSError as error:  # a full disk, a broken mount
            raise click.ClickException(f"{error.strerror or error}: {error.filename or 'while writing'}") from None

    return run


def cache_compilations() -> None:
    """Compiled programs are kept in the user's cache folder: the second call starts at once."""
    import jax

    if jax.config.values["jax_compilation_cache_dir"]:
        return
    base = os.environ.get("XDG_CACHE_HOME") or (Path.home() / ".cache")
    folder = Path(base) / "if_jax" / "compiled"
    if not folder.exists():
        click.echo(
            f"the first call compiles, which later calls find in {folder} (or JAX_COMPILATION_CACHE_DIR)", err=True
        )
    jax.config.update("jax_compilation_cache_dir", str(folder))
