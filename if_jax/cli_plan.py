"""`if-jax plan`: whether a recipe fits a TPU slice, how fast it trains there, and what it costs; no TPU is used.

With --cascade the same of drawing.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from if_jax.cli_errors import plain_errors
from if_jax.cli_options import refuse_without_effect
from if_jax.cli_recipe import read_recipe

if TYPE_CHECKING:
    from if_jax.planning.blocks import Block
    from if_jax.planning.estimate import Case

_BEST = 3  # ways to train that a search prints


@click.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.option("--config", type=click.Path(), help="The recipe whose training is planned.")
@click.option("--cascade", help="Plan drawing instead: a release folder, or presets: IF-I-XL,IF-II-L.")
@click.option("--batch", type=click.IntRange(min=1), help="Pictures that a chip draws at a time [default: 1].")
@click.option("--stages", type=click.IntRange(min=1), help="Draw only so many stages.")
@click.option("--slice", "slice_name", required=True, help="Google's name of the slice: v5e-16, v5p-128, v6e-256, …")
@click.option("--slices", default=1, show_default=True, help="How many such slices, joined by a slower network.")
@click.option("--price", type=click.FloatRange(min=0, min_open=True), help="What you pay for one chip for an hour.")
@click.option("--search", is_flag=True, help="Try meshes, accumulate and remat, and print the three fastest that fit.")
@click.option("--whole", is_flag=True, help="Compile the whole step too, for the compiler's own account of memory.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the page.")
@click.pass_context
@plain_errors
def plan(
    context: click.Context,
    config: str | None,
    cascade: str | None,
    batch: int | None,
    stages: int | None,
    slice_name: str,
    slices: int,
    price: float | None,
    search: bool,
    whole: bool,
    as_json: bool,
) -> None:
    """Plan a training run, or drawing: whether it fits, how long it takes and what it costs. Starts nothing.

    Compiles the blocks of its networks with the real TPU compiler, minutes the first time, and adds up its estimates.
    What was compiled is kept, so that a plan that was interrupted goes on where it was. Recipe keys are set with
    --config.KEY=VALUE, as for train. Exits with 1 where nothing fits.

    \b
    Example:  if-jax plan --config configs/if_I_M.py --slice v5e-16 --price 1.2
              if-jax plan --cascade IF-I-XL,IF-II-L --slice v5e-1 --batch 4
    """
    from if_jax.config import to_recipe
    from if_jax.planning import plan as planning
    from if_jax.planning import report
    from if_jax.planning.estimate import Case
    from if_jax.planning.slices import parse_slice

    if (config is None) == (cascade is None):
        raise ValueError("give either --config, to plan training, or --cascade, to plan drawing")
    if config is None:
        refuse_without_effect(["search", "whole"], "--cascade plans drawing, which is done one way")
        if context.args:
            raise ValueError(f"{context.args[0]}: recipe keys go with --config; a cascade draws by its own settings")
        _plan_drawing(cascade or "", stages, slice_name, slices, batch or 1, price, as_json, context)
        return
    refuse_without_effect(["batch", "stages"], "a recipe says how many pictures itself: --config.batch_size")
    if search and whole:
        refuse_without_effect(["whole"], "--search compiles blocks alone; plan its best way with --whole afterwards")
    slice_ = parse_slice(slice_name, slices)
    recipe = to_recipe(read_recipe(config, context.args))
    case, words = Case(recipe, planning.text_config(recipe), slice_), tuple(context.args)
    if not search:
        compile_step = partial(planning.compile_whole_step, progress=_tell_whole) if whole else None
        made = planning.make_plan(
            case, price=price, config=config, progress=_Progress(), changes=words, whole=compile_step
        )
        click.echo(json.dumps(report.as_json(made)) if as_json else report.as_text(made))
        context.exit(0 if made.memory.fits else 1)
    best = planning.search_plans(case, _say_combination, price=price, config=config, words=words)[:_BEST]
    click.echo(json.dumps([report.as_json(made) for made in best]) if as_json else report.as_table(best))


def _plan_drawing(
    cascade: str,
    stages: int | None,
    slice_name: str,
    slices: int,
    batch: int,
    price: float | None,
    as_json: bool,
    context: click.Context,
) -> None:
    from if_jax.planning import drawing, drawing_report
    from if_jax.planning.slices import parse_slice

    nets, where = drawing.read_nets(cascade, stages), parse_slice(slice_name, slices)
    made = drawing.plan_drawing(nets, where, batch, price=price, progress=_Progress())
    click.echo(json.dumps(drawing_report.as_json(made)) if as_json else drawing_report.as_text(made))
    context.exit(0 if made.fits else 1)


class _Progress:
    """A line on standard error for each block that was compiled; on a terminal, each in the place of the last."""

    def __init__(self, title: str = "") -> None:
        self.title = title
        self.done = 0

    def __call__(self, block: Block, figures: Any, seconds_left: float, left: int) -> None:
        self.done += 1
        state = "failed" if "error" in figures else f"{figures['seconds']:.0f} s"
        wait = f"about {_minutes(seconds_left)} left" if left else "done"
        _say(
            f"{self.title}compiled {self.done} of {self.done + left} blocks, {wait} ({block.label()}: {state})",
            not left,
        )


def _say_combination(number: int, count: int, case: Case) -> _Progress:
    """The progress of one of the combinations that a search compiles."""
    return _Progress(f"{number} of {count}, {case.core_rows} picture(s) at a time, remat {case.recipe.remat}: ")


def _tell_whole(passed: float, left: float) -> None:
    wait = f"about {_minutes(left)} left" if left else "longer than expected"
    _say(f"compiling the whole step, {_minutes(passed)} so far, {wait}", False)


def _say(line: str, last: bool) -> None:
    on_terminal = sys.stderr.isatty()
    click.echo(f"\r\033[K{line}" if on_terminal else line, nl=not on_terminal or last, err=True)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
