"""The command that scores a cascade: SynthEval's prompts, or captions against true pictures."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import click

from if_jax.cli_errors import cache_compilations, plain_errors
from if_jax.cli_options import StageOptions, read_loras, refuse_without_effect, stage_words
from if_jax.cli_recipe import joined

if TYPE_CHECKING:
    from if_jax.evaluation.captioned import CaptionedSuite
    from if_jax.evaluation.opening import Opening

SUITES = ("synth", "coco")
_CAPTIONED = ("captions", "reference", "reference_size", "features", "stages", "share", "keep_pictures", "sweep")
_CAPTIONED += ("watch", "watch_every", "coordinator", "processes", "process")
_SWEPT = ("guidance", "steps", "sampler", "noise-level")


class EvaluateOptions(StageOptions):
    """Values of the options that decide what is drawn and measured."""

    lora: tuple[str, ...]
    dtype: str
    rules: str
    captions: str | None
    reference: str | None
    reference_size: int | None
    features: tuple[str, ...]
    stages: int | None
    share: str | None
    coordinator: str | None
    processes: int | None
    process: int | None
    keep_pictures: bool
    sweep: str | None
    watch: str | None
    watch_every: int | None
    overwrite: bool


@click.command()
@click.option("--cascade", default="demo", show_default=True, help="Release folder, or the demo in the package.")
@click.option(
    "--suite", type=click.Choice(SUITES), default="synth", show_default=True, help="synth: known truth; coco: captions."
)
@click.option("--prompts", type=int, help="How many [default: 420; coco: 30000].")
@click.option("--seed", default=0, show_default=True, help="Another seed asks for and draws other pictures.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Write the report here too.")
@click.option("--out", type=click.Path(file_okay=False), help="Folder of report and pictures [default: out/SUITE].")
@click.option("--guidance", multiple=True, type=float, help="Guidance scale of stage I, then II; repeatable.")
@click.option("--steps", multiple=True, help="Steps of each stage: smart50, ays10, 27. Repeatable.")
@click.option("--sampler", multiple=True, help="ddpm, ddim or dpm++ of each stage; repeatable.")
@click.option("--noise-level", multiple=True, type=int, help="0-999, of stage II; repeatable.")
@click.option("--set", "words", multiple=True, help="Any word of a stage: I.eta=0.5. Repeatable.")
@click.option("--lora", multiple=True, metavar="FILE[:WEIGHT]", help="Draw with a LoRA file; repeatable.")
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16"]))
@click.option(
    "--rules",
    default="dp",
    show_default=True,
    help="Over the devices of a process: dp draws on each, fsdp or fsdp_tp split nets that none of them holds.",
)
@click.option("--captions", type=click.Path(), help="coco: captions as text, JSON lines or COCO's JSON.")
@click.option("--reference", type=click.Path(), help="coco: folder of true pictures, or its reference.npz.")
@click.option("--reference-size", type=int, help="coco: cut and scale the true pictures to so many pixels.")
@click.option(
    "--features",
    multiple=True,
    help="coco: inception=FILE, clip=FOLDER, dinov2=FOLDER, efficientnet or reader; repeatable.",
)
@click.option("--stages", type=int, help="coco: draw only so many stages, and measure the last.")
@click.option("--share", help="coco: K/N, draw the K-th of N shares, beside other processes; K from 1.")
@click.option("--coordinator", help="coco: HOST:PORT of process 0, as for train: each process draws its share.")
@click.option("--processes", type=int, help="coco: how many processes draw together.")
@click.option("--process", type=int, help="coco: which of them this is: 0, 1, …")
@click.option("--keep-pictures", is_flag=True, help="coco: write the pictures too.")
@click.option("--sweep", help=f"coco: WORD=VALUE,VALUE,… of stage I ({', '.join(_SWEPT)}).")
@click.option("--watch", metavar="RUN", help="coco: score the checkpoints of a run as they appear, until it ends.")
@click.option("--watch-every", type=int, help="coco: steps between two scores of --watch, at least [default: each].")
@click.option("--overwrite", is_flag=True, help="Replace the pictures of another evaluation in OUT.")
@plain_errors
def evaluate(
    cascade: str,
    suite: str,
    prompts: int | None,
    seed: int,
    json_path: str | None,
    out: str | None,
    **options: Unpack[EvaluateOptions],
) -> None:
    """Score a cascade.

    synth asks for prompts whose truth is known: objects, counts, colours, places and words, read by programs. coco
    draws captions and compares the pictures with true ones: FID, KID, precision, recall, CLIP score, CMMD, in the
    features of networks whose weights you have. The same command goes on where one was interrupted.

    \b
    Example:  if-jax evaluate --cascade demo --suite synth --prompts 60 --seed 1 --json scores.json
              if-jax evaluate --suite coco --captions captions.txt --reference photos --features clip=clip-vit-l-14
    """
    from if_jax.checkpoints.files import write_json
    from if_jax.evaluation.draw_prompts import is_report
    from if_jax.inference.options import Bars

    if json_path and not Path(json_path).absolute().parent.is_dir():
        raise FileNotFoundError(f"--json {json_path}: its folder does not exist; make it first")
    if json_path and Path(json_path).exists() and not is_report(Path(json_path)):
        raise ValueError(f"--json {json_path} exists and is no report, so it is not replaced: give another name")
    if suite == "synth":
        refuse_without_effect(_CAPTIONED, "SynthEval brings its captions and readers; say --suite coco")
    elif options["captions"] is None:
        raise ValueError("--captions is missing: which captions are drawn? Give a file of them")
    out = out or f"out/{suite}"
    words = stage_words(options, ("I", "II", "III")[: options["stages"] or 2])  # the stages that are scored
    with Bars("picture") as bars:
        common: dict[str, Any] = {
            "overwrite": options["overwrite"],
            "say": lambda line: click.echo(line, err=True),
            "progress": bars.show,
        }
        if suite == "synth":
            from if_jax.evaluation.synth import suite as synth

            cache_compilations()
            count = synth.DEFAULT_PROMPTS if prompts is None else prompts
            drawn = {"options": _options(words), "opening": _opening(options)}
            result: Any = synth.evaluate(cascade, out, count=count, seed=seed, **drawn, **common)
            lines = [*synth.summary(result), f"{out}/report.html and report.json written"]
        else:
            result, lines = _captioned(cascade, prompts, seed, out, words, options, common)
    if json_path and result:
        write_json(Path(json_path), result)
    for line in lines:
        click.echo(line)


def _captioned(
    cascade: str,
    prompts: int | None,
    seed: int,
    out: str,
    words: dict[str, dict[str, object]],
    options: EvaluateOptions,
    common: dict[str, Any],
) -> tuple[Any, list[str]]:
    """The report, or None where there are several or it is another's, and the lines about it."""
    from if_jax.config import HostsConfig
    from if_jax.parallel import failures

    watch, sweep, share = options["watch"], options["sweep"], options["share"]
    if watch:
        refuse_without_effect(
            ("cascade", "share", "sweep", "coordinator"), "--watch scores a run's own checkpoints; leave it out"
        )
    else:
        refuse_without_effect(("watch_every",), "it goes with --watch; name the run too")
    if share:
        refuse_without_effect(("coordinator",), "--share says already which share is drawn; leave one of them out")
    if (size := options["reference_size"]) is not None and size < 1:
        raise ValueError(f"--reference-size is {size}: give 1 or more pixels")
    of_share = _share(share)
    networks = _networks(options["features"])
    processes = options["coordinator"], options["processes"], options["process"]
    alone = nullcontext() if watch or share else joined(HostsConfig(), *processes)
    with alone, failures.propagated():
        import jax

        from if_jax.evaluation import captioned

        cache_compilations()
        suite = captioned.CaptionedSuite(
            captions=options["captions"] or "",
            reference=options["reference"],
            networks=networks,
            count=captioned.DEFAULT_PROMPTS if prompts is None else prompts,
            seed=seed,
            stages=options["stages"],
            reference_side=options["reference_size"],
            share=of_share,
            keep_pictures=options["keep_pictures"],
            opening=_opening(options),
        )
        if watch:
            return None, _watch(watch, options["watch_every"], suite, out, _options(words), common)
        if sweep:
            lines = _sweep(cascade, suite, out, sweep, words, common)
            return None, lines if jax.process_index() == 0 else []
        result = captioned.evaluate(cascade, suite, out, options=_options(words), **common)
        if result is None or jax.process_index() > 0:
            return None, []
        return result, [*captioned.summary(result), f"{out}/report.json written"]


def _opening(options: EvaluateOptions) -> Opening:
    from if_jax.evaluation.opening import Opening
    from if_jax.parallel.rules import PRESETS

    if options["rules"] not in PRESETS:
        raise ValueError(f"--rules {options['rules']!r}: use one of {', '.join(PRESETS)}")
    return Opening(options["dtype"], options["rules"], read_loras(options["lora"], "--lora"))


def _watch(
    run: str, every: int | None, suite: CaptionedSuite, out: str, options: dict[str, Any], common: dict[str, Any]
) -> list[str]:
    from if_jax.evaluation import captioned, run_scores

    if every is not None and every < 1:
        raise ValueError(f"--watch-every is {every}: give 1 or more steps")
    scored = run_scores.watch(run, suite, out, every=every or 1, options=options, **common)
    lines = [f"step {step:8} {line}" for step, report in scored for line in captioned.summary(report)]
    return [*lines, f"{out}/step-N/report.json and {run}/{run_scores.NAME}.jsonl written"]


def _sweep(
    cascade: str,
    suite: CaptionedSuite,
    out: str,
    text: str,
    words: dict[str, dict[str, object]],
    common: dict[str, Any],
) -> list[str]:
    from if_jax.evaluation import captioned, curve

    name, _, values = text.partition("=")
    if name not in _SWEPT or not all(values.split(",")):
        raise ValueError(f"--sweep {text!r}: write WORD=VALUE,VALUE with one of {', '.join(_SWEPT)}")
    settings = {}
    for value in values.split(","):
        options: Any = {"guidance": (), "steps": (), "sampler": (), "noise_level": (), "words": ()}
        try:
            typed = {"guidance": float, "noise-level": int}.get(name, str)(value)
        except ValueError:
            raise ValueError(f"--sweep {text!r}: {value!r} is no value of {name}") from None
        options[name.replace("-", "_")] = (typed,)
        swept = stage_words(options, tuple(words))
        settings[value] = _options({stage: words[stage] | swept[stage] for stage in words})
    rows = curve.sweep(cascade, suite, out, name, settings, **common)
    lines = [f"{name} {value:8} {line}" for value, report in rows or () for line in captioned.summary(report)]
    return [*lines, f"{out}/curve.png, curve.html and curve.json written"] if rows else []


def _options(words: dict[str, dict[str, object]]) -> dict[str, Any]:
    return {f"if_{stage}_kwargs": kwargs for stage, kwargs in words.items() if kwargs}


def _networks(features: Sequence[str]) -> dict[str, str | None]:
    networks: dict[str, str | None] = {}
    for text in features or ("reader",):
        name, _, path = text.partition("=")
        if name in networks:
            raise ValueError(f"--features {name} is given twice: once each")
        networks[name] = path or None
    return networks


def _share(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    number, _, total = text.partition("/")
    if not (number.isdigit() and total.isdigit() and 1 <= int(number) <= int(total)):
        raise ValueError(f"--share {text!r}: write K/N with 1 ≤ K ≤ N, such as 1/4")
    return int(number) - 1, int(total)
