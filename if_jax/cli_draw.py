"""The four commands that draw: dream, style-transfer, super-resolution, inpaint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, Unpack, cast

import click

from if_jax.checkpoints.stages import STAGE_NAMES
from if_jax.cli_errors import cache_compilations, check_wandb_login, plain_errors
from if_jax.cli_options import (
    StageOptions,
    installed_version,
    read_loras,
    refuse_without_effect,
    stage_words,
    was_written,
)

if TYPE_CHECKING:
    from PIL import Image

    from if_jax.inference.cascade import Cascade
    from if_jax.inference.pictures import Notes

_SHARED = (
    click.option("--cascade", default="demo", show_default=True, help="Release folder, or the demo in the package."),
    click.option("--lora", multiple=True, metavar="FILE[:WEIGHT]", help="Draw with a LoRA file; repeatable."),
    click.option("--new-words", multiple=True, metavar="FILE", help="Draw with words that were trained; repeatable."),
    click.option("--out", default="out", show_default=True, type=click.Path(file_okay=False), help="Folder for PNGs."),
    click.option("--seed", default=0, show_default=True, help="The same seed draws the same pictures."),
    click.option("--stages", type=int, help="Draw only so many stages [default: all]."),
    click.option("--negative-prompt", help="What to draw away from."),
    click.option("--style-prompt", help="IF's style: pooled in place of the prompt, and mixed into it."),
    click.option("--guidance", multiple=True, type=float, help="Guidance scale of stage I, then II, …; repeatable."),
    click.option("--steps", multiple=True, help="Steps of each stage: smart50, ays10, 27, 10,10,5. Repeatable."),
    click.option("--sampler", multiple=True, help="ddpm, ddim or dpm++ of each stage; repeatable."),
    click.option("--noise-level", multiple=True, type=int, help="0-999, of stage II, then III; repeatable."),
    click.option("--set", "words", multiple=True, help="Any word of a stage: I.eta=0.5, II.strength=0.6. Repeatable."),
    click.option("--batch-size", type=int, help="Pictures drawn at a time [default: 1 on a CPU, else 4]."),
    click.option("--dtype", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16"])),
    click.option("--low-memory", is_flag=True, help="One network in memory at a time, the text encoder first."),
    click.option("--text-int8", is_flag=True, help="The text encoder's weights in 8 bits."),
    click.option(
        "--guard", type=click.Path(), help="IF's safety_checker folder: blurs unsafe and watermarked pictures."
    ),
    click.option(
        "--watermark", is_flag=False, flag_value="", help="Mark the pictures: ours, or IF's from a PNG of it."
    ),
    click.option("--wandb", metavar="PROJECT", help="Log prompts, settings and pictures to a Weights & Biases table."),
    click.option("--overwrite", is_flag=True, help="Replace pictures of earlier calls; otherwise they are kept."),
)


class DrawOptions(StageOptions):
    """Values of the options that all four commands have."""

    cascade: str
    lora: tuple[str, ...]
    new_words: tuple[str, ...]
    out: str
    seed: int
    stages: int | None
    negative_prompt: str | None
    style_prompt: str | None
    batch_size: int | None
    dtype: str
    low_memory: bool
    text_int8: bool
    guard: str | None
    watermark: str | None
    wandb: str | None
    overwrite: bool
    first_picture: NotRequired[int]  # of --like


_FOR_DRAWING = (
    *("out", "seed", "negative_prompt", "style_prompt", "guidance", "steps", "sampler", "noise_level"),
    *("words", "batch_size", "guard", "watermark", "wandb", "overwrite", "aspect_ratio"),
)
_DECIDED_BY_LIKE = (
    *("seed", "stages", "negative_prompt", "style_prompt", "guidance", "steps", "sampler", "noise_level", "words"),
    *("batch_size", "dtype", "text_int8", "aspect_ratio", "lora", "new_words"),
)


_NOTED = {"mode", "cascade", "options", "dtype", "text_int8", "picture", "prompt"}  # what it takes to draw it again


def _drawing(command: Callable[..., None]) -> Callable[..., None]:
    """The options that all four commands have."""
    command = plain_errors(command)
    for option in reversed(_SHARED):
        command = option(command)
    return command


@click.command()
@click.argument("prompts", nargs=-1)
@click.option("--aspect-ratio", help="Width:height [default: 1:1].")
@click.option("--like", type=click.Path(), help="Repeat this picture of an earlier call, with its settings.")
@click.option("--vary", type=click.Path(), help="A picture to draw variations of, by cascades that read clip_image.")
@click.option("--embeds", type=click.Path(), help="Text states of --save-embeds, in place of prompts.")
@click.option("--save-embeds", type=click.Path(), help="Encode PROMPTS into this file, and draw nothing.")
@_drawing
def dream(
    prompts: tuple[str, ...],
    aspect_ratio: str | None,
    like: str | None,
    vary: str | None,
    embeds: str | None,
    save_embeds: str | None,
    **options: Unpack[DrawOptions],
) -> None:
    """Draw PROMPTS: OUT/0000-I.png, OUT/0000-II.png, … and OUT/grid-I.png, …

    \b
    Example:  if-jax dream "two red spheres" "a blue cube" --out out --seed 1
              if-jax dream --like out/0001-II.png --out again
    """
    if vary and (like or embeds or save_embeds):
        raise ValueError("--vary goes with PROMPTS, or with none: leave --like, --embeds and --save-embeds out")
    if sum(map(bool, (prompts or vary, like, embeds))) != 1:
        raise ValueError("give either PROMPTS, or --embeds, or --like")
    if save_embeds and not prompts:
        raise ValueError("--save-embeds encodes PROMPTS: give them, without --embeds or --like")
    if like:
        refuse_without_effect(_DECIDED_BY_LIKE, "--like repeats the picture with its own settings; leave it out")
        _repeat(like, options)
        return
    request: dict[str, object] = {"aspect_ratio": aspect_ratio or "1:1"}
    names = list(prompts) or ([""] if vary else [])
    if vary:
        request["vary"] = vary
    if save_embeds:
        refuse_without_effect(_FOR_DRAWING, "--save-embeds draws nothing; leave it out")
        _save_embeds(save_embeds, names, options)
        return
    if embeds:
        from if_jax.inference.prompts import load_embeds

        if not options["negative_prompt"] and not options["style_prompt"]:
            refuse_without_effect(["text_int8"], "with --embeds no text is encoded; leave it out")
        names, states = load_embeds(embeds)
        request |= states
    _draw("dream", names, request, options)


@click.command("style-transfer")
@click.argument("image", type=click.Path())
@click.argument("prompts", nargs=-1)
@_drawing
def style_transfer(image: str, prompts: tuple[str, ...], **options: Unpack[DrawOptions]) -> None:
    """Draw IMAGE anew after PROMPTS, one picture for each; without, after --style-prompt.

    \b
    Example:  if-jax style-transfer photo.jpg "a wooden toy" --set I.strength=0.6
    """
    texts = list(prompts) or ([options["style_prompt"]] if options["style_prompt"] else [])
    if not texts:
        raise ValueError("give PROMPTS, or --style-prompt")
    _draw("style_transfer", texts, {"image": image}, options)


@click.command("super-resolution")
@click.argument("image", type=click.Path())
@click.argument("prompts", nargs=-1)
@click.option("--stage", default="II", show_default=True, help="The stage that enlarges first.")
@_drawing
def super_resolution(image: str, prompts: tuple[str, ...], stage: str, **options: Unpack[DrawOptions]) -> None:
    """Enlarge IMAGE; PROMPTS say what it shows.

    \b
    Example:  if-jax super-resolution small.png "two red spheres" --noise-level 100
    """
    _draw("super_resolution", list(prompts) or [""], {"image": image, "stage": stage}, options)


@click.command()
@click.argument("image", type=click.Path())
@click.argument("mask", type=click.Path())
@click.argument("prompts", nargs=-1, required=True)
@_drawing
def inpaint(image: str, mask: str, prompts: tuple[str, ...], **options: Unpack[DrawOptions]) -> None:
    """Draw the white part of MASK anew in IMAGE after PROMPTS, and keep the rest.

    \b
    Example:  if-jax inpaint room.png mask.png "a blue cube"
    """
    _draw("inpainting", list(prompts), {"image": image, "mask_image": mask}, options)


COMMANDS = (dream, style_transfer, super_resolution, inpaint)


def _draw(mode: str, names: list[str], request: dict[str, object], options: DrawOptions) -> None:
    """Load, draw, save, log.

    Args:
      mode: name of the method of `Cascade`.
      names: the prompts, for files and tables.
      request: what this mode alone takes.
      options: of the command.
    """
    from if_jax.inference.options import Bars
    from if_jax.inference.pictures import save_pictures

    names = [name.encode("utf-8", "replace").decode() for name in names]  # a stray byte of the command line is a "?"

    out, mark, first = Path(options["out"]), options["watermark"], options.get("first_picture", 0)
    _check_files(out, mark)
    check_wandb_login(options["wandb"], "--wandb")
    start = STAGE_NAMES.index(request["stage"]) if request.get("stage") in STAGE_NAMES else 0
    stage_words(options, STAGE_NAMES[start : options["stages"]])  # what no cascade takes is refused before it is read
    cascade = _load(options)
    words = stage_words(options, STAGE_NAMES[start : options["stages"] or len(cascade.stages)])
    arguments: dict[str, object] = {f"if_{stage}_kwargs": kwargs for stage, kwargs in words.items() if kwargs}
    arguments |= {word: options[word] for word in ("seed", "stages", "negative_prompt", "style_prompt", "batch_size")}
    arguments |= {word: value for word, value in request.items() if word not in ("image", "mask_image")}
    if first:
        arguments["first_picture"] = first
    pictures = {word: request[word] for word in ("image", "mask_image") if word in request}
    texts = None if "prompt_embeds" in request else names
    if options["guard"]:
        from if_jax.inference.guard import SafetyGuard

        pictures["guard"] = guard = SafetyGuard(options["guard"])
        _ = guard.weights  # what cannot be read is refused before anything is drawn
    with Bars() as bars:
        drawn = getattr(cascade, mode)(prompt=texts, **pictures, **arguments, progress=bars.show)
    for stage, scores in drawn.guarded.items():
        for row, score in enumerate(scores):
            if score.hidden:
                what = f"unsafe {score.unsafe:.2f}, watermark {score.watermark:.2f}"
                click.echo(f"picture {first + row} of stage {stage} is blurred: {what}", err=True)
    notes = _notes(mode, names, request, arguments, options)
    written, kept = save_pictures(
        drawn,
        out,
        overwrite=options["overwrite"],
        first=first,
        captions=names,
        notes=notes,
        watermark=mark if mark is None else Path(mark) if mark else True,
    )
    if options["wandb"]:
        _log_table(options["wandb"], out, options["seed"], names, drawn, notes)
    left = f", {len(kept)} kept (--overwrite replaces those of if-jax)" if kept else ""
    click.echo(f"{len(written)} pictures written to {out}{left}")


def _load(options: DrawOptions) -> Cascade:
    import jax.numpy as jnp

    from if_jax.inference.cascade import Cascade

    cache_compilations()
    return Cascade.load(
        options["cascade"],
        stages=options["stages"],
        lora=read_loras(options["lora"], "--lora"),
        new_words=options["new_words"],
        dtype=jnp.dtype(options["dtype"]),
        param_dtype=options["dtype"],
        text_dtype="int8" if options["text_int8"] else options["dtype"],
        low_memory=options["low_memory"],
    )


def _repeat(path: str, options: DrawOptions) -> None:
    """Draw what `dream` has drawn into a picture, from the settings that the file holds."""
    from if_jax.inference.pictures import read_notes

    notes = read_notes(path)
    if needed := sorted(_NOTED - notes.keys()):
        raise ValueError(f"{path}: its settings lack {', '.join(needed)}: give a PNG that `if-jax dream` has drawn")
    if notes["mode"] != "dream":
        raise ValueError(f"{path}: drawn by {notes['mode']} over another picture: give that command the picture again")
    if notes.get("embeds"):
        raise ValueError(f"{path}: drawn from text states in a file: give --embeds again")
    chosen = {word: notes["options"][word] for word in ("negative_prompt", "style_prompt", "stages", "batch_size")}
    words = tuple(
        f"{stage}.{word}={json.dumps(value)}"
        for stage in STAGE_NAMES[: notes["options"]["stages"]]
        for word, value in notes["options"].get(f"if_{stage}_kwargs", {}).items()
    )
    repeated = {**options, **chosen, "words": words, "guidance": (), "steps": (), "sampler": (), "noise_level": ()}
    cascade = options["cascade"] if was_written("cascade") else notes["cascade"]  # it may have moved
    repeated |= {"cascade": cascade, "seed": notes["options"]["seed"], "first_picture": notes["picture"]}
    repeated |= {"dtype": notes["dtype"], "text_int8": notes["text_int8"]}
    repeated |= {"lora": tuple(f"{file}:{weight}" for file, weight in notes.get("lora", {}).items())}
    repeated |= {"new_words": tuple(notes.get("new_words", ()))}
    request: dict[str, object] = {"aspect_ratio": notes["options"]["aspect_ratio"]}
    request |= {"vary": notes["vary"]} if "vary" in notes else {}
    _draw("dream", [notes["prompt"]], request, cast(DrawOptions, repeated))


def _notes(
    mode: str, names: list[str], request: dict[str, object], arguments: dict[str, object], options: DrawOptions
) -> Notes:
    """What each PNG says of itself: everything that it takes to draw it again."""
    keep = {
        word: value for word, value in arguments.items() if not word.endswith("_embeds") and word != "first_picture"
    }
    shared = {"if_jax": installed_version(), "mode": mode, "cascade": options["cascade"], "options": keep}
    shared |= {word: str(request[word]) for word in ("image", "mask_image", "vary") if word in request}
    shared |= {"dtype": options["dtype"], "text_int8": options["text_int8"], "embeds": "prompt_embeds" in request}
    if options["lora"]:
        shared["lora"] = {str(file): weight for file, weight in read_loras(options["lora"], "--lora").items()}
    if options["new_words"]:
        shared["new_words"] = list(options["new_words"])
    first = options.get("first_picture", 0)
    return lambda stage, row: {**shared, "stage": stage, "picture": first + row, "prompt": names[row]}


def _save_embeds(path: str, prompts: list[str], options: DrawOptions) -> None:
    from if_jax.inference.prompts import save_embeds

    states = _load({**options, "stages": 1, "low_memory": True}).embed([*prompts, ""])
    save_embeds(path, prompts, states[:-1], states[-1])
    click.echo(f"{path}: text states of {len(prompts)} prompts, {states[:-1].shape}")


def _log_table(
    project: str, out: Path, seed: int, names: list[str], drawn: dict[str, list[Image.Image]], notes: Notes
) -> None:
    """One row for each prompt; the run's files lie in OUT/wandb, and WANDB_MODE=offline keeps them there."""
    import wandb

    stages = list(drawn)
    with wandb.init(project=project, job_type="draw", dir=out) as run:
        table = wandb.Table(columns=["prompt", "seed", "settings", *stages])
        for row, name in enumerate(names):
            about = notes(stages[-1], row)
            pictures = [wandb.Image(drawn[stage][row]) for stage in stages]
            table.add_data(name, seed, json.dumps(about), *pictures)
        run.log({"pictures": table})


def _check_files(out: Path, watermark: str | None) -> None:
    """Before anything is drawn, not after."""
    if watermark and not Path(watermark).is_file():
        raise FileNotFoundError(
            f"--watermark {watermark}: no such file; give a PNG with alpha, or no value for our mark"
        )
    above = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise PermissionError(f"{out}: cannot write there; give another folder with --out")
