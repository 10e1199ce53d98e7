"""What the commands that follow a recipe share: they read it, and may be several processes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from if_jax.cli_errors import cache_compilations

if TYPE_CHECKING:
    from if_jax.config import HostsConfig


def read_recipe(path: str, overrides: list[str]) -> Any:
    """A recipe file with `--config.KEY=VALUE` applied, through ml_collections' own flags.

    Args:
      path: FILE, or FILE:FORM.
      overrides: the other words of the command line.

    Returns:
      A ConfigDict.

    Raises:
      FileNotFoundError, ValueError: one line.
    """
    from absl import flags
    from ml_collections import config_flags

    from if_jax.config import check_override

    if not Path(path.partition(":")[0]).is_file():
        raise FileNotFoundError(f"recipe {path!r} does not exist: give a file such as configs/demo_base.py")
    for number, argument in enumerate(overrides):
        if match := re.fullmatch(r"--?config\.([^=\s]+)(=(.*))?", argument, re.DOTALL):
            following = overrides[number + 1] if number + 1 < len(overrides) else None
            check_override(match[1], match[3] if match[2] else following)
    values, arguments = flags.FlagValues(), ["if-jax", f"--config={path}", *overrides]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    try:
        left_over = values(arguments)[1:]
    except (flags.Error, AttributeError, LookupError, TypeError, ValueError) as error:
        # Of an error inside the file the flags library quotes the whole traceback; its last line says what is wrong.
        message = str(error).strip().splitlines()[-1]
        raise ValueError(f"recipe {path} cannot be read ({message}): correct it, or the --config.KEY=VALUE") from None
    if left_over:
        raise ValueError(f"unexpected argument {left_over[0]!r}: recipe keys are set with --config.KEY=VALUE")
    return values.config


@contextmanager
def joined(waits: HostsConfig, coordinator: str | None, processes: int | None, process: int | None) -> Iterator[None]:
    """Around what the processes of a command do: they find each other first, and what may pass ends them with its code.

    Args:
      waits: how long they wait for each other.
      coordinator: as for `hosts.connect`.
      processes: likewise.
      process: likewise.
    """
    from if_jax.parallel import failures, hosts
    from if_jax.parallel.rendezvous import ProcessMissing

    seconds = {"start_seconds": waits.start_seconds, "heartbeat_seconds": waits.heartbeat_seconds}
    try:
        hosts.connect(coordinator, processes, process, **seconds)
        cache_compilations()
        yield
    except ProcessMissing as error:
        hosts.exit_process(str(error), hosts.EXIT_PROCESS_MISSING)
    except Exception as error:
        if not failures.is_transient(error):
            raise
        hosts.exit_process(f"{failures.one_line(error)} (this may pass: try again)", hosts.EXIT_TRANSIENT)
