"""The command that scores a cascade."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

import click

from if_jax.cli_errors import cache_compilations, plain_errors
from if_jax.cli_options import StageOptions, stage_words


@click.command()
@click.option("--cascade", default="demo", show_default=True, help="Release folder, or the demo in the package.")
@click.option("--suite", default="synth", show_default=True, help="Which prompts and readers: synth.")
@click.option("--prompts", type=int, help="How many [default: 420].")
@click.option("--seed", default=0, show_default=True, help="Another seed asks for and draws other pictures.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Write the report here too.")
@click.option("--out", type=click.Path(file_okay=False), help="Folder of report and pictures [default: out/SUITE].")
@click.option("--guidance", multiple=True, type=float, help="Guidance scale of stage I, then II; repeatable.")
@click.option("--steps", multiple=True, help="Steps of each stage: smart50, ays10, 27. Repeatable.")
@click.option("--sampler", multiple=True, help="ddpm, ddim or dpm++ of each stage; repeatable.")
@click.option("--noise-level", multiple=True, type=int, help="0-999, of stage II; repeatable.")
@click.option("--set", "words", multiple=True, help="Any word of a stage: I.eta=0.5. Repeatable.")
@click.option("--overwrite", is_flag=True, help="Replace the pictures of another evaluation in OUT.")
@plain_errors
def evaluate(
    cascade: str,
    suite: str,
    prompts: int | None,
    seed: int,
    json_path: str | None,
    out: str | None,
    overwrite: bool,
    **stage_options: Unpack[StageOptions],
) -> None:
    """Score a cascade on prompts whose truth is known: objects, counts, colours, places and words, read by programs.

    Writes OUT/report.json, OUT/report.html and the pictures; the same command goes on where one was interrupted.

    \b
    Example:  if-jax evaluate --cascade demo --suite synth --prompts 60 --seed 1 --json scores.json
    """
    from if_jax.checkpoints.files import write_json
    from if_jax.evaluation.draw_prompts import is_report
    from if_jax.evaluation.synth import suite as synth
    from if_jax.inference.options import Bars

    if json_path and not Path(json_path).absolute().parent.is_dir():
        raise FileNotFoundError(f"--json {json_path}: its folder does not exist; make it first")
    if json_path and Path(json_path).exists() and not is_report(Path(json_path)):
        raise ValueError(f"--json {json_path} exists and is no report, so it is not replaced: give another name")
    words = stage_words(stage_options, ("I", "II"))  # the stages that are scored
    options = {f"if_{stage}_kwargs": kwargs for stage, kwargs in words.items() if kwargs}
    out = out or f"out/{suite}"
    cache_compilations()
    with Bars("picture") as bars:
        result = synth.evaluate(
            cascade,
            suite,
            out,
            count=synth.DEFAULT_PROMPTS if prompts is None else prompts,
            seed=seed,
            options=options,
            overwrite=overwrite,
            say=lambda line: click.echo(line, err=True),
            progress=bars.show,
        )
    if json_path:
        write_json(Path(json_path), result)
    for line in synth.summary(result):
        click.echo(line)
    click.echo(f"{out}/report.html and report.json written")
