"""The command that serves: a page and an HTTP API, on this machine unless asked otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from if_jax.cli_errors import cache_compilations, plain_errors
from if_jax.cli_options import installed_version, read_loras

if TYPE_CHECKING:
    from if_jax.inference.cascade import Cascade

_EXAMPLES = ("two red spheres and a blue cube", "a green cylinder", "a purple sphere left of a red cube")


@click.command()
@click.option("--cascade", default="demo", show_default=True, help="Release folder, or the demo in the package.")
@click.option("--lora", multiple=True, metavar="FILE[:WEIGHT]", help="Draw with a LoRA file; repeatable.")
@click.option("--new-words", multiple=True, metavar="FILE", help="Draw with words that were trained; repeatable.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; another needs --auth.")
@click.option("--port", default=7860, show_default=True, type=click.IntRange(0, 65535))
@click.option("--auth", type=click.Path(path_type=Path), help="File with a line NAME TOKEN for each client.")
@click.option("--batch-size", type=click.IntRange(1), help="Pictures in one program [default: 1 on a CPU, else 4].")
@click.option("--warm", multiple=True, default=("1:1",), show_default=True, help="Aspect ratio to compile; repeatable.")
@click.option("--sizes", default="any", show_default=True, type=click.Choice(["any", "listed"]), help="Aspect ratios.")
@click.option("--stages", type=int, help="Serve only so many stages [default: all].")
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16"]))
@click.option("--text-int8", is_flag=True, help="The text encoder's weights in 8 bits.")
@click.option("--queue", default=256, show_default=True, type=click.IntRange(1), help="Pictures that may wait.")
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path), help="Folder for finished pictures.")
@click.option("--watermark", is_flag=False, flag_value="", help="Mark the pictures: ours, or IF's from a PNG of it.")
@click.option("--guard", type=click.Path(), help="IF's safety_checker folder: blurs unsafe and watermarked pictures.")
@click.option("--no-page", is_flag=True, help="The HTTP API alone.")
@plain_errors
def serve(
    cascade: str,
    lora: tuple[str, ...],
    new_words: tuple[str, ...],
    host: str,
    port: int,
    auth: Path | None,
    batch_size: int | None,
    warm: tuple[str, ...],
    sizes: str,
    stages: int | None,
    dtype: str,
    text_int8: bool,
    queue: int,
    keep: Path | None,
    watermark: str | None,
    guard: str | None,
    no_page: bool,
) -> None:
    """Serve a page to draw on, and an HTTP API (/docs). A picture depends on its seed, number and prompt alone.

    \b
    Example:  if-jax serve
              if-jax serve --host 0.0.0.0 --auth tokens.txt --batch-size 8 --warm 1:1 --warm 3:2
    """
    try:
        from if_jax.inference.guard import SafetyGuard
        from if_jax.inference.options import checked_batch_size
        from if_jax.inference.pictures import read_mark
        from if_jax.serving import files, run
        from if_jax.serving.guard import read_tokens
        from if_jax.serving.requests import Limits
    except ImportError as error:
        raise ValueError(f"serve needs {error.name}, which is not installed: pip install 'if_jax[serve]'") from None
    if host not in run.LOCAL and auth is None:
        raise ValueError(f"--host {host} is open to other machines: give --auth FILE with a line NAME TOKEN for each")
    tokens = read_tokens(auth) if auth else None
    for ratio in warm:
        _check_ratio(ratio)
    with run.listen(host, port) as taken:
        mark = None if watermark is None else read_mark(Path(watermark) if watermark else True)
        hides = SafetyGuard(guard) if guard else None
        if hides:
            _ = hides.weights  # what cannot be read is refused before anything is drawn
        opened, notes = _open(cascade, stages, lora, new_words, dtype, text_int8)
        address = f"http://{f'[{host}]' if ':' in host else host}:{taken.getsockname()[1]}"
        click.echo(f"{address}{'/docs' if no_page else ''}  (Ctrl-C ends it)")
        batch_size = checked_batch_size(batch_size)
        run.serve(
            opened,
            taken,
            files=files.PictureFiles(notes, batch_size=batch_size, mark=mark, folder=keep),
            batch_size=batch_size,
            limits=Limits(queue=queue),
            ratios=warm,
            listed=sizes == "listed",
            tokens=tokens,
            page=not no_page,
            examples=_EXAMPLES,
            guard=hides,
        )


def _open(
    folder: str, stages: int | None, lora: tuple[str, ...], new_words: tuple[str, ...], dtype: str, text_int8: bool
) -> tuple[Cascade, dict[str, Any]]:
    """The cascade, and what its pictures say of it."""
    import jax.numpy as jnp

    from if_jax.inference.cascade import Cascade

    cache_compilations()
    loras = read_loras(lora, "--lora")
    opened = Cascade.load(
        folder,
        stages=stages,
        lora=loras,
        new_words=new_words,
        dtype=jnp.dtype(dtype),
        param_dtype=dtype,
        text_dtype="int8" if text_int8 else dtype,
    )
    notes: dict[str, Any] = {"if_jax": installed_version(), "cascade": folder, "dtype": dtype, "text_int8": text_int8}
    if loras:
        notes["lora"] = {str(file): weight for file, weight in loras.items()}
    if new_words:
        notes["new_words"] = list(new_words)
    return opened, notes


def _check_ratio(ratio: str) -> None:
    from if_jax.inference.inputs import parse_aspect_ratio

    try:
        parse_aspect_ratio(ratio)
    except ValueError as error:
        raise ValueError(f"--warm: {error}") from None
