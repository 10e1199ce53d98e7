"""The command that keeps the text states of a source."""

from __future__ import annotations

import click

from if_jax.cli_errors import plain_errors
from if_jax.cli_recipe import joined, read_recipe


@click.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.option("--config", required=True, type=click.Path(), help="The recipe that will train with the embeddings.")
@click.option("--out", help="Where to write, gs:// works too [default: ./data/embeddings].")
@click.option("--form", default="exact", show_default=True, type=click.Choice(["exact", "compact"]))
@click.option("--batch-size", default=64, show_default=True, help="Captions encoded at a time.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@click.option(
    "--across-hosts", is_flag=True, help="Lay the encoder across the devices of all hosts: those of one do not hold it."
)
@click.option("--coordinator", help="HOST:PORT of process 0, as for train.")
@click.option("--processes", type=int, help="How many processes embed together.")
@click.option("--process", type=int, help="Which of them this is: 0, 1, …")
@click.pass_context
@plain_errors
def embed(
    context: click.Context,
    config: str,
    out: str | None,
    form: str,
    batch_size: int,
    overwrite: bool,
    across_hosts: bool,
    coordinator: str | None,
    processes: int | None,
    process: int | None,
) -> None:
    """Encode every caption of the recipe's data.source once, for training with --config.data.embeddings=OUT.

    `exact` holds what the UNet attends, bit for bit; `compact` is several times smaller and an approximation. The same
    command goes on with a cache that was interrupted. Started on every host of a slice it divides the work, and OUT is
    a folder that all of them see.

    \b
    Example:  if-jax embed --config configs/if_I_L.py --config.data.source=data/mine --out data/mine-t5
    """
    from if_jax.config import to_recipe
    from if_jax.parallel import failures

    recipe = to_recipe(read_recipe(config, context.args))
    if recipe.trains_text:
        raise ValueError("recipe key text_encoder_from is empty: only a frozen text encoder's states can be kept")
    with joined(recipe.hosts, coordinator, processes, process), failures.propagated():
        from if_jax.checkpoints.encoders import read_encoders
        from if_jax.data.embed import embed as write
        from if_jax.data.embed import host_mesh
        from if_jax.data.sources import open_stored
        from if_jax.parallel import mesh, rules
        from if_jax.training.stage import unet_config

        data, layout = recipe.data, recipe.mesh
        sizes = (layout.data, layout.fsdp, layout.tensor)
        encoders = read_encoders(recipe.text_encoder_from, recipe.encoders, recipe.conditioning.clip_from)
        parts = unet_config(recipe, encoders.clip.shapes if encoders.clip else None).text_parts
        write(
            open_stored(data.source, data.keep.at_least(data.size), exclude=data.exclude, settings=data.remote),
            encoders,
            out or "data/embeddings",
            form=form,
            preparation=data.preparation,
            mesh=mesh.make_mesh(*sizes) if across_hosts else host_mesh(*sizes, sharding_rules=layout.rules),
            sharding_rules=rules.PRESETS[layout.rules],
            batch_size=batch_size,
            overwrite=overwrite,
            settings=data.remote,
            length=recipe.text_length,
            parts=parts,
            wait=recipe.hosts.start_seconds,
            say=click.echo,
        )
