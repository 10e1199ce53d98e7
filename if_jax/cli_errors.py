"""What every command of the command line shares: a mistake is one line, `~` is the home folder, programs are kept."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from if_jax.checkpoints.files import user_cache

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
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a sign that the terminal's encoding lacks is no reason to end
                stream.reconfigure(errors="replace")
        try:
            return command(*args, **kwargs)
        except BrokenPipeError as error:
            if _reader_is_gone():
                raise  # click ends without a word: `| head` has read enough
            raise click.ClickException(f"{error.strerror}: {error.filename or 'while writing'}") from None
        except _MISTAKES as error:
            raise click.ClickException(" ".join(str(error).split())) from None
        except OSError as error:  # a full disk, a broken mount
            raise click.ClickException(f"{error.strerror or error}: {error.filename or 'while writing'}") from None

    return run


class Commands(click.Group):
    """A group of commands that know `~` also where a shell leaves it as it is: `--out=~/pictures`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Puts the home folder into the words of the command line that begin with `~/`, then parses them."""

        def expand(word: str) -> str:
            option = re.match(r"(--[\w.-]+=)?", word)
            path = word[option.end() if option else 0 :]
            return word.removesuffix(path) + os.path.expanduser(path) if re.match(r"~(/|$)", path) else word

        return super().parse_args(ctx, [expand(word) for word in args])


def check_wandb_login(project: str | None, where: str) -> None:
    """Asks for what Weights & Biases needs before any work is done, not after.

    Args:
      project: that will be logged to; None or "": nothing is asked.
      where: the option or key that names it.

    Raises:
      ValueError: the package or a login is missing.
    """
    if not project:
        return
    try:
        import wandb
    except ImportError:
        raise ValueError(f"{where} {project!r} needs the wandb package: pip install 'if_jax[wandb]'") from None
    mode = os.environ.get("WANDB_MODE", "online")
    try:
        known = mode != "online" or bool(wandb.api.api_key)
    except (OSError, RuntimeError, ValueError):  # no home to look into
        known = bool(os.environ.get("WANDB_API_KEY"))
    if not known:
        raise ValueError(
            f"{where} {project!r}: nobody is logged in at Weights & Biases; run `wandb login`, set WANDB_API_KEY, or "
            "set WANDB_MODE=offline to keep the run here"
        )


def _reader_is_gone() -> bool:
    """Whether what reads our standard output has closed it."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        return True
    return False


def _is_writable(folder: Path) -> bool:
    """Whether a folder, which may not exist yet, can be made and written to."""
    try:
        above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except OSError:  # a home that may not even be looked into
        return False
    return above.is_dir() and os.access(above, os.W_OK | os.X_OK)


def cache_compilations() -> None:
    """Compiled programs are kept in the user's cache folder: the second call starts at once."""
    import jax

    if jax.config.values["jax_compilation_cache_dir"]:
        return
    cache = user_cache()
    folder = cache and cache / "compiled"
    if folder is None or not _is_writable(folder):  # no home, or one that cannot be written: all works without
        return
    if not folder.exists():
        click.echo(
            f"the first call compiles, which later calls find in {folder} (or JAX_COMPILATION_CACHE_DIR)", err=True
        )
    jax.config.update("jax_compilation_cache_dir", str(folder))
