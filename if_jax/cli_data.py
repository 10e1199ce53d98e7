"""The commands that build and inspect data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from if_jax.cli_errors import cache_compilations, plain_errors
from if_jax.cli_options import refuse_without_effect

RUNNERS = ("DirectRunner", "DataflowRunner", "FlinkRunner", "SparkRunner", "PortableRunner")  # of Apache Beam


@click.group()
def data() -> None:
    """Build and inspect data sets of captioned pictures."""


@data.command("build")
@click.argument("name", type=click.Choice(["scenes", "tasks", "emoji", "folder"]))
@click.option("--out", help="Where to write [default: ./data/NAME].")
@click.option("--source", help="folder: pictures or tars; emoji: where npm put its packages [default: fetched].")
@click.option("--count", default=10_000, show_default=True, help="scenes, tasks: how many.")
@click.option("--size", default=256, show_default=True, help="Side of the pictures written.")
@click.option("--seed", default=0, show_default=True, help="scenes, tasks: which ones.")
@click.option(
    "--renderer", default="raycast", show_default=True, type=click.Choice(["raycast", "mitsuba"]), help="scenes, tasks."
)
@click.option("--workers", type=int, help="Processes [default: one per core].")
@click.option("--overwrite", is_flag=True, help="Replace what exists.")
@plain_errors
def data_build(name: str, out: str | None, **options: Any) -> None:
    """Write a data set: `scenes` or `tasks` (drawn here), `emoji` (fetched by npm) or `folder` (any --source).

    The same command goes on with a build that was interrupted. `--renderer mitsuba` (pip install 'if_jax[mitsuba]')
    path-traces the same scenes, seconds a picture: a look that no reader of ours was fitted to.

    \b
    Example:  if-jax data build scenes --count 2000
              if-jax data build tasks --renderer mitsuba --count 300 --size 64 --out data/traced
              if-jax data build folder --source my_pictures --out data/mine
    """
    from if_jax.data import builders

    of_scenes = ("count", "seed", "renderer")
    ignored = of_scenes if name in ("emoji", "folder") else ("source",)
    refuse_without_effect(ignored, f"`data build {name}` does not take it; leave it out")
    if options["renderer"] == "mitsuba":
        refuse_without_effect(["workers"], "Mitsuba has threads of its own; leave it out")
    click.echo(builders.build(name, out or f"data/{name}", **options))


@data.command("subject")
@click.argument("pictures")
@click.option("--prompt", required=True, help='Caption of all PICTURES, with a rare word: "a photo of a sks dog".')
@click.option("--class-prompt", required=True, help='The same without that word: "a photo of a dog".')
@click.option("--out", default="data/subject", show_default=True, help="Gets the folders instance and class.")
@click.option("--cascade", default="demo", show_default=True, help="What draws the class: a release, or the demo.")
@click.option("--count", default=200, show_default=True, help="Pictures of the class; 0: no prior preservation.")
@click.option("--seed", default=0, show_default=True, help="Of those.")
@click.option("--stages", default=1, show_default=True, help="How many draw them: 2 to train stage II.")
@click.option("--overwrite", is_flag=True, help="Replace class pictures that were drawn for something else.")
@plain_errors
def data_subject(pictures: str, out: str, **options: Any) -> None:
    """Write what DreamBooth trains on: PICTURES of a subject, and pictures of its class drawn by a cascade.

    The same command draws only what is missing. Train with --config.data.source="0.5*OUT/instance + 0.5*OUT/class".

    \b
    Example:  if-jax data subject my_dog --prompt "a photo of a sks dog" --class-prompt "a photo of a dog"
    """
    from if_jax.inference.options import Bars
    from if_jax.inference.subject import write_subject

    cache_compilations()
    with Bars("picture") as bars:
        own, drawn = write_subject(pictures, out, progress=bars.show, **options)
    click.echo(f"{out}: {own} pictures of the subject, {options['count']} of its class ({drawn} drawn now)")


@data.command("index")
@click.argument("source")
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[-- RUNNER OPTIONS]")
@click.option("--check", default="decode", show_default=True, type=click.Choice(["decode", "headers"]))
@click.option("--workers", type=int, help="Processes of this machine [default: one per core].")
@click.option("--reindex", is_flag=True, help="Index again what has changed since.")
@click.option("--runner", type=click.Choice(RUNNERS), help="Apache Beam's [default: none, processes here].")
@click.option("--requester-pays", default="", help="Project that is billed for reading a requester-pays bucket.")
@plain_errors
def data_index(
    source: str,
    options: tuple[str, ...],
    check: str,
    workers: int | None,
    reindex: bool,
    runner: str | None,
    requester_pays: str,
) -> None:
    """Index what is not indexed yet of SOURCE (any that `data inspect` takes and that is stored), and report it.

    The index is one part beside each tar or folder. The same command goes on with a job that was stopped. `--check
    headers` reads sizes from the heads of pictures and decodes none: one that cannot be decoded is then replaced in
    training. With `--runner` Apache Beam does it (pip install 'if_jax[beam]'), on this machine or on a cluster.

    \b
    Example:  if-jax data index gs://bucket/my_tars --check headers
              if-jax data index gs://bucket/my_tars --runner DataflowRunner -- --project=mine --region=us-central1
    """
    from if_jax.data.index_job import index_source
    from if_jax.data.inspect import describe
    from if_jax.data.remote import RemoteSettings

    if options and not runner:
        raise ValueError(f"{options[0]!r} is an option for a runner of Beam: name one with --runner, or leave it out")
    if runner and runner != "DirectRunner":
        refuse_without_effect(["workers"], f"{runner} takes it as an option of its own, behind --; leave it out")
    if workers is not None and workers < 1:
        raise ValueError(f"--workers {workers}: give at least 1")
    settings = RemoteSettings(requester_pays=requester_pays)
    job = {"check": check, "workers": workers, "reindex": reindex, "runner": runner or "", "options": options}
    stored = index_source(source, settings=settings, say=lambda line: click.echo(line, err=True), **job)
    click.echo("\n".join(describe(stored)))


@data.command("inspect")
@click.argument("path")
@click.option("--sheet", type=click.Path(dir_okay=False), help="PNG with samples [default: ./NAME-sheet.png].")
@click.option("--samples", default=24, show_default=True, help="Pictures on it.")
@click.option("--size", default=0, show_default=True, help="Count as usable only what has so many pixels a side.")
@click.option("--exclude", default="", help="File that lists keys or hashes of addresses not to be used.")
@click.option("--workers", type=int, help="Processes that index tars [default: one per core].")
@click.option("--reindex", is_flag=True, help="Index again what has changed since.")
@click.option("--overwrite", is_flag=True, help="Replace a sheet of an earlier call.")
@plain_errors
def data_inspect(
    path: str,
    sheet: str | None,
    samples: int,
    size: int,
    exclude: str,
    workers: int,
    reindex: bool,
    overwrite: bool,
) -> None:
    """Print what PATH holds, usable records first, and draw a sheet of samples.

    PATH is a folder of pictures, tar files ("shards/{00000..00041}.tar"), a data set built here or by TensorFlow
    Datasets (its folder or name, @SPLIT behind it), any of these in a bucket (gs://…), or a source that is drawn, such
    as tasks.

    \b
    Example:  if-jax data inspect data/scenes
    """
    from if_jax.data.index import Filter
    from if_jax.data.inspect import inspect
    from if_jax.inference.pictures import is_own, write_png

    if samples < 1:
        raise ValueError(f"--samples {samples}: give at least 1")
    settings = {"samples": samples, "exclude": exclude, "reindex": reindex, "workers": workers}
    inspection = inspect(path, Filter(min_side=size), **settings)
    click.echo(inspection)
    name = Path(path).resolve().name if Path(path).exists() else Path(path).name
    target = Path(sheet or "".join(c if c.isalnum() or c in "-_@" else "-" for c in name) + "-sheet.png")
    if target.exists() and not target.is_file():  # a device or pipe: a rename would replace it with a file
        with target.open("wb") as device:
            inspection.sheet.save(device, "PNG")
    elif target.exists() and not (overwrite and is_own(target)):
        click.echo(f"{target} exists and is kept (--overwrite replaces a sheet of if-jax)")
    else:
        write_png(target, inspection.sheet)
        click.echo(f"samples on {target}")
