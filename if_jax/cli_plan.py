"""`if-jax plan`: whether a recipe fits a TPU slice, how fast it trains there, and what it costs; no TPU is used."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from if_jax.cli_errors import plain_errors
from if_jax.cli_recipe import read_recipe

if TYPE_CHECKING:
    from if_jax.planning.blocks import Block


@click.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.option("--config", required=True, type=click.Path(), help="The recipe to be planned.")
@click.option("--slice", "slice_name", required=True, help="Google's name of the slice: v5e-16, v5p-128, v6e-256, …")
@click.option(
    "--slices", default=1, show_default=True, help="How many such slices, joined by the data centre's network."
)
@click.option("--price", type=click.FloatRange(min=0, min_open=True), help="What you pay for one chip for an hour.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the page.")
@click.pass_context
@plain_errors
def plan(
    context: click.Context,
    config: str,
    slice_name: str,
    slices: int,
    price: float | None,
    as_json: bool,
) -> None:
    """Plan a training run: whether it fits, how fast it is, how long it takes and what it costs. Starts nothing.

    Compiles the recipe's blocks with the real TPU compiler, minutes the first time, and adds up its estimates.

    \b
    Example:  if-jax plan --config configs/if_I_M.py --slice v5e-16 --price 1.2
    """
    from if_jax.config import to_recipe
    from if_jax.planning import plan as planning
    from if_jax.planning import report
    from if_jax.planning.estimate import Case
    from if_jax.planning.slices import parse_slice

    slice_ = parse_slice(slice_name, slices)
    recipe = to_recipe(read_recipe(config, context.args))
    case = Case(recipe, planning.text_config(recipe), slice_)
    changes = tuple(context.args)
    made = planning.make_plan(case, price=price, config=config, progress=_Progress(), changes=changes)
    click.echo(json.dumps(report.as_json(made)) if as_json else report.as_text(made))


class _Progress:
    """A line on standard error for each block that was compiled; on a terminal, each in the place of the last."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.done = 0

    def __call__(self, block: Block, figures: Any, seconds_left: float, left: int) -> None:
        self.done += 1
        state = "failed" if "error" in figures else f"{figures['seconds']:.0f} s"
        wait = f"about {_minutes(seconds_left)} left" if left else "done"
        line = f"compiled {self.done} of {self.done + left} blocks, {wait} ({block.label()}: {state})"
        on_terminal = sys.stderr.isatty()
        click.echo(f"\r\033[K{line}" if on_terminal else line, nl=not on_terminal or not left, err=True)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
