"""Options that speak of stages, and options that would do nothing: those are refused by name."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

import click
from click.core import ParameterSource

from if_jax.checkpoints.stages import STAGE_NAMES


class StageOptions(TypedDict):
    """Values of the options that speak of stages, in turn; `evaluate` has them too."""

    guidance: tuple[float, ...]
    steps: tuple[str, ...]
    sampler: tuple[str, ...]
    noise_level: tuple[int, ...]
    words: tuple[str, ...]


def stage_words(options: StageOptions, drawn: Sequence[str]) -> dict[str, dict[str, object]]:
    """What the options say of each stage that draws.

    Args:
      options: of the command; repeated, they speak of the stages in turn.
      drawn: names of the stages that draw, in order.

    Returns:
      Stage's name → the words of `if_I_kwargs`.

    Raises:
      ValueError: a malformed --set, or an option for a stage that does not draw.
    """
    words: dict[str, dict[str, object]] = {stage: {} for stage in drawn}
    enlarging = [stage for stage in drawn if stage != "I"]
    named = (
        ("guidance_scale", "--guidance", options["guidance"], drawn),
        ("sample_timestep_respacing", "--steps", options["steps"], drawn),
        ("sample_loop", "--sampler", options["sampler"], drawn),
        ("noise_level", "--noise-level", options["noise_level"], enlarging),
    )
    for word, option, values, stages in named:
        if len(values) > len(stages):
            raise ValueError(
                f"{option} is given {len(values)} times: {len(stages)} stages that are drawn take it"
                f" ({', '.join(stages) or 'none'})"
            )
        for stage, value in zip(stages, values, strict=False):
            words[stage][word] = value
    for pair in options["words"]:
        name, _, value = pair.partition("=")
        stage, _, word = name.partition(".")
        if stage not in STAGE_NAMES or not word or not value:
            raise ValueError(f"--set {pair!r}: write STAGE.WORD=VALUE, such as I.eta=0.5")
        if stage not in words:
            raise ValueError(f"--set {pair!r}: stage {stage} is not drawn, only {', '.join(drawn)}; leave it out")
        words[stage][word] = _parsed(value)
    return words


def read_loras(words: Sequence[str], option: str) -> dict[str | Path, float]:
    """LoRA files with their weights, as the command line gives them.

    Args:
      words: FILE or FILE:WEIGHT each.
      option: that they were given to, for messages.

    Returns:
      File → weight, 1 unless given.

    Raises:
      ValueError: a weight is no number, or a file is there twice.
    """
    loras: dict[str | Path, float] = {}
    for word in words:
        file, weight = word, 1.0
        if ":" in word and not Path(word).exists():
            file, _, number = word.rpartition(":")
            try:
                weight = float(number)
            except ValueError:
                raise ValueError(f"{option} {word}: {number!r} is no weight; write FILE:0.8") from None
        if file in loras:
            raise ValueError(f"{option} {file} is given twice: once, with one weight")
        loras[file] = weight
    return loras


def installed_version() -> str:
    """The version of the package that is installed; "source" for a source tree that is not."""
    try:
        return version("if_jax")
    except PackageNotFoundError:
        return "source"


def refuse_without_effect(names: Collection[str], why: str) -> None:
    """Refuses options of the running command that were written, but would do nothing.

    Args:
      names: of the command's parameters.
      why: they would do nothing, and what to do.

    Raises:
      ValueError: names the first of them.
    """
    context = click.get_current_context()
    for parameter in context.command.params:
        written = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if parameter.name in names and written:
            raise ValueError(f"{parameter.opts[0]} would do nothing: {why}")


def was_written(name: str) -> bool:
    """Whether a parameter of the running command stands on the command line."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


def _parsed(value: str) -> object:
    try:
        return json.loads(value)
    except ValueError:
        return value
