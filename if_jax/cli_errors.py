"""What every command of the command line shares: how it tells of mistakes, and where compiled programs are kept."""

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
