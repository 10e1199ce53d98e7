"""The command line: parse, call, print. Every mistake of a user ends in one line and a non-zero exit code."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from if_jax.cli_data import data
from if_jax.cli_draw import COMMANDS
from if_jax.cli_embed import embed
from if_jax.cli_errors import Commands, check_wandb_login
from if_jax.cli_errors import plain_errors as _plain_errors
from if_jax.cli_evaluate import evaluate
from if_jax.cli_options import read_loras, refuse_without_effect
from if_jax.cli_plan import plan
from if_jax.cli_recipe import joined, read_recipe
from if_jax.cli_serve import serve


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="if_jax")
def main() -> None:
    """if_jax: text in, a cascade of pixel diffusion stages draws 64 → 256 → 1024 pixels.

    \b
    Example:  if-jax dream "two red spheres and a blue cube" --out out
    """


for _command in (*COMMANDS, data, evaluate, embed, plan, serve):
    main.add_command(_command)


@main.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.option("--config", required=True, type=click.Path(), help="A recipe from configs/.")
@click.option("--workdir", required=True, help="Folder of the run; gs:// works too.")
@click.option("--coordinator", help="HOST:PORT of process 0, where nothing else tells; see --processes, --process.")
@click.option("--processes", type=int, help="How many processes train together.")
@click.option("--process", type=int, help="Which of them this is: 0, 1, …")
@click.pass_context
@_plain_errors
def train(
    context: click.Context,
    config: str,
    workdir: str,
    coordinator: str | None,
    processes: int | None,
    process: int | None,
) -> None:
    """Train one stage; the same command resumes it. Recipe keys are set with --config.KEY=VALUE.

    On a TPU VM, GKE, Slurm or Open MPI the processes of a run find each other by themselves.

    \b
    Example:  if-jax train --config configs/demo_base.py --workdir runs/I --config.batch_size=16
    """
    from if_jax.config import to_recipe
    from if_jax.parallel import hosts
    from if_jax.tracking.goodput import process_start
    from if_jax.training.loop import train as run_training

    recipe = to_recipe(read_recipe(config, context.args))
    if not process:
        check_wandb_login(recipe.wandb, "recipe key wandb")
    try:
        with joined(recipe.hosts, coordinator, processes, process):
            run_training(recipe, workdir, began=process_start())
    except hosts.Terminated as error:
        click.echo(f"Error: {error}", err=True)
        context.exit(hosts.EXIT_TERMINATED)
    except KeyboardInterrupt:
        click.echo(f"\nError: interrupted; the same command goes on from the newest checkpoint of {workdir}", err=True)
        context.exit(hosts.EXIT_INTERRUPTED)
    click.echo(f"trained to step {recipe.steps}: {workdir}")


@main.command()
@click.argument("workdir")
@click.option("--fault-hours", default=3.0, show_default=True, help="Hours between faults, for the interval to advise.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON instead of the table.")
@_plain_errors
def goodput(workdir: str, fault_hours: float, as_json: bool) -> None:
    """Print where the time of the run in WORKDIR went: the share that made progress, and what the rest was lost to.

    \b
    Example:  if-jax goodput runs/I
    """
    from if_jax.tracking import goodput as times

    report = times.report(times.account(times.read_events(workdir)), fault_hours * 3600)
    click.echo(json.dumps(report) if as_json else times.table(report))


@main.command()
@click.argument("folders", nargs=-1, required=True, metavar="RUNS... CASCADE")
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16", "float16"]))
@click.option(
    "--lora", metavar="OUT", help="Write the factors of one LoRA run alone: a folder, or a .safetensors file."
)
@click.option("--new-words", metavar="OUT", help="Write the words of one run alone: a folder, or a .safetensors file.")
@click.option("--steps", multiple=True, help="Default steps of stage I, II, …; repeatable.")
@click.option("--guidance", multiple=True, type=float, help="Default guidance scale of stage I, II, …; repeatable.")
@click.option("--noise-level", multiple=True, type=int, help="Default noise level (0-999) of stage II, …; repeatable.")
@click.option("--max-shard-size", help="Largest weight file, such as 5GB [default: one file].")
@click.option("--variant", help="Word in the names of the weight files, such as fp16.")
@click.option("--ema-decay", default="", help="Which average of the weights [default: the recipe's first].")
@click.option(
    "--ema-length", type=float, help="Or the length of an average made of snapshots (posthoc_ema), such as 0.08."
)
@click.option("--scores", type=click.Path(dir_okay=False), help="JSON of measured scores for the model card.")
@click.option("--overwrite", is_flag=True, help="Replace CASCADE if it exists.")
@_plain_errors
def export(
    folders: tuple[str, ...],
    dtype: str,
    lora: str | None,
    new_words: str | None,
    steps: tuple[str, ...],
    guidance: tuple[float, ...],
    noise_level: tuple[int, ...],
    max_shard_size: str | None,
    variant: str | None,
    ema_decay: str,
    ema_length: float | None,
    scores: str | None,
    overwrite: bool,
) -> None:
    """Publish the EMA weights of RUNS (stage I, II, …) as a release that stock diffusers opens.

    One super-resolution run alone becomes a stage folder rather than a cascade. The factors of a LoRA run go into its
    weights, or with --lora into a file that diffusers' load_lora_weights opens. New words go into the text encoder, or
    with --new-words into a file.

    \b
    Example:  if-jax export runs/I runs/II my_cascade --dtype float16
              if-jax export runs/style --lora my_style
    """
    from if_jax.checkpoints.files import parse_bytes, read_json
    from if_jax.checkpoints.tensors import Storage
    from if_jax.training.publish import publish, publish_lora, publish_words

    if lora or new_words:
        option, what = ("--lora", "factors") if lora else ("--new-words", "words")
        without = ["steps", "guidance", "noise_level", "max_shard_size", "variant", "scores", "ema_length"]
        without += ["new_words"] if lora else ["dtype"]
        refuse_without_effect(without, f"{option} writes the {what} alone; leave it out")
        if len(folders) != 1:
            raise ValueError(
                f"{option} writes the {what} of one run, but {len(folders)} folders are given: name one run"
            )
        if lora:
            written = publish_lora(folders[0], lora, dtype=dtype, ema_decay=ema_decay, overwrite=overwrite)
        else:
            written = publish_words(folders[0], str(new_words), ema_decay=ema_decay, overwrite=overwrite)
        click.echo(f"{written}: " + (f"LoRA, {dtype}" if lora else "new words, float32"))
        return
    *runs, cascade = folders
    if not runs:
        raise click.UsageError("Missing argument 'CASCADE'.")
    publish(
        runs,
        cascade,
        storage=Storage(dtype, parse_bytes(max_shard_size) if max_shard_size else None, variant),
        steps=steps,
        guidance=guidance,
        noise_level=noise_level,
        scores=read_json(Path(scores)) if scores else None,
        ema_decay=ema_decay,
        ema_length=ema_length,
        overwrite=overwrite,
    )
    click.echo(f"{cascade}: {len(runs)} stage(s), {dtype}")


@main.command("ema-sweep")
@click.argument("workdir")
@click.option("--lengths", help="Lengths to try, as 0.03,0.05,0.1 [default: seven from 0.02 to 0.2].")
@_plain_errors
def ema_sweep(workdir: str, lengths: str | None) -> None:
    """Measure the validation loss of averages of several lengths, made of the snapshots of the run in WORKDIR.

    The pictures and timesteps are those of the recipe's validation section. WORKDIR/ema/lengths.json has the numbers;
    `if-jax export --ema-length` publishes one.

    \b
    Example:  if-jax ema-sweep runs/I --lengths 0.03,0.05,0.1,0.15
    """
    from if_jax.training import posthoc

    try:
        chosen = [float(word) for word in lengths.split(",")] if lengths else posthoc.SWEPT
    except ValueError:
        raise ValueError(f"--lengths {lengths}: give numbers joined by commas, such as 0.03,0.05,0.1") from None
    click.echo("length  loss (mean)")
    best = min(posthoc.sweep(workdir, chosen, click.echo), key=lambda row: row["validation/mean"])
    click.echo(f"least at {best['length']:g}: if-jax export {workdir} CASCADE --ema-length {best['length']:g}")


@main.command()
@click.argument("source")
@click.argument("destination")
@click.option(
    "--to",
    "layout",
    default="diffusers",
    show_default=True,
    type=click.Choice(["diffusers", "deepfloyd"]),
    help="Layout to write.",
)
@click.option("--merge", multiple=True, metavar="FILE[:WEIGHT]", help="Bake a LoRA file into the weights; repeatable.")
@click.option("--new-words", multiple=True, metavar="FILE", help="Put trained words into it; repeatable.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Precision [default: as it is].")
@click.option("--max-shard-size", help="Largest weight file, such as 5GB [default: one file].")
@click.option("--variant", help="Word in the names of the weight files, such as fp16.")
@click.option("--text-encoder", help="T5 folder or release whose encoder goes with a base stage that has none.")
@click.option("--overwrite", is_flag=True, help="Replace DESTINATION if it exists.")
@_plain_errors
def convert(
    source: str,
    destination: str,
    layout: str,
    merge: tuple[str, ...],
    new_words: tuple[str, ...],
    dtype: str | None,
    max_shard_size: str | None,
    variant: str | None,
    text_encoder: str | None,
    overwrite: bool,
) -> None:
    """Copy the model in SOURCE to DESTINATION in another layout or precision, without changing a bit it need not.

    SOURCE is a cascade, a diffusers IF folder, a DeepFloyd folder (config.yml, pytorch_model.bin) or a T5 folder.

    \b
    Example:  if-jax convert IF-I-M-v1.0 if_m --to diffusers --text-encoder t5-v1_1-xxl
              if-jax convert my_cascade for_deepfloyd --to deepfloyd
              if-jax convert my_cascade in_my_style --merge my_style:0.8
    """
    from tqdm import tqdm

    from if_jax.checkpoints import convert as converter
    from if_jax.checkpoints.files import parse_bytes
    from if_jax.checkpoints.tensors import Storage

    storage = Storage(dtype, parse_bytes(max_shard_size) if max_shard_size else None, variant)
    model = converter.open_model(source, text_encoder)
    if new_words:
        model = converter.with_new_words(model, new_words)
    if merge:
        model = converter.with_merged(model, read_loras(merge, "--merge"))
    converter.check_text(model, layout)  # before the bar
    with tqdm(total=converter.stored_bytes(model, storage), unit="B", unit_scale=True, desc=layout) as bar:
        converter.write_model(model, destination, layout, storage, overwrite, progress=bar.update)
    count = len(model.stages)
    click.echo(f"{destination}: " + (f"{count} stage(s)" if count else "text encoder") + f", {layout} layout")


@main.command()
@click.argument("a")
@click.argument("b")
@click.option("--tolerance", default=1e-5, show_default=True, help="Largest relative difference that passes.")
@click.option("--pictures", type=click.Path(file_okay=False), help="Draw with both; folder for the picture.")
@click.option("--torch", is_flag=True, help="Outputs of A's blocks from stock PyTorch diffusers and transformers.")
@click.option("--text-encoder", help="T5 folder or release whose encoder goes with A, a base stage that has none.")
@_plain_errors
def verify(a: str, b: str, tolerance: float, pictures: str | None, torch: bool, text_encoder: str | None) -> None:
    """Compare the models in A and B (any layout): every tensor, every block's output, how they draw.

    Exits with 1 where they differ by more than the tolerance, naming the tensors.

    \b
    Example:  if-jax verify my_cascade for_deepfloyd
    """
    from if_jax.inference.verify import verify as compare

    report = compare(a, b, tolerance, pictures, torch, text_encoder, say=click.echo)
    if report.failures:
        raise click.ClickException(f"{a} and {b} are not the same model: {len(report.failures)} difference(s)")
    click.echo(f"the same model, to {tolerance:g}")


@main.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.option("--config", type=click.Path(), help="The recipe to be trained.")
@click.option("--workdir", help="Folder of the run; gs:// works too.")
@click.option("--coordinator", help="HOST:PORT of process 0, as for train; run this on all processes at once.")
@click.option("--processes", type=int, help="How many processes will train together.")
@click.option("--process", type=int, help="Which of them this is: 0, 1, …")
@click.option("--wait", default=60, show_default=True, help="Seconds to wait for other processes and for devices.")
@click.option("--data-only", is_flag=True, help="Look only at what is read from buckets; touches no device.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list of {check, status, message, remedy}.")
@click.pass_context
@_plain_errors
def doctor(context: click.Context, config: str | None, as_json: bool, **options: Any) -> None:
    """Name what would stop a run, before it costs money: one line for each check, with a remedy where one is needed.

    Looks at versions, TPU lock, devices, run folder, disk, recipe, memory, data and the other processes; ends nothing
    and changes nothing. Exits with 1 where a check fails.

    \b
    Example:  if-jax doctor --config configs/demo_base.py --workdir runs/I
    """
    from if_jax.doctor.examine import disconnect, examine
    from if_jax.parallel.hosts import check_address

    check_address(options["coordinator"], options["processes"], options["process"])
    if config is None and context.args:
        raise ValueError(f"unexpected argument {context.args[0]!r}: give a recipe with --config")
    findings = []
    for finding in examine((lambda: read_recipe(config, context.args)) if config else None, **options):
        findings.append(finding)
        if not as_json:
            click.echo(finding.line())
    if as_json:
        click.echo(json.dumps([finding.as_json() for finding in findings], indent=1, ensure_ascii=False))
    code = int(any(finding.status == "fail" for finding in findings))
    disconnect(code)
    context.exit(code)


if __name__ == "__main__":
    sys.exit(main())
