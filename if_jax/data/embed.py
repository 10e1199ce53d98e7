"""`if-jax embed`: a frozen text encoder run over all captions of a source, on the mesh."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from if_jax.checkpoints.stages import TextEncoder
from if_jax.checkpoints.weights import boxed_params, load_params
from if_jax.data.embeddings import EmbeddingSpec, Encode, make_spec, read_captions, write_embeddings
from if_jax.data.preprocessing import Preparation
from if_jax.data.sources import Stored
from if_jax.models.t5 import T5Encoder
from if_jax.parallel import rules
from if_jax.text.tokens import TEXT_LENGTH


def embed(
    stored: Stored,
    text: TextEncoder,
    out: str | Path,
    *,
    form: str,
    preparation: Preparation,
    mesh: Mesh,
    sharding_rules: rules.Rules,
    batch_size: int,
    overwrite: bool = False,
    say: Callable[[str], Any] = print,
) -> None:
    """Write the cache of a source's captions; its size and the time it takes are said before it starts.

    Args:
      stored: the source.
      text: the encoder, with its tokenizer.
      out: the folder to write.
      form: one of `embeddings.FORMS`.
      preparation: how captions are prepared.
      mesh: devices the encoder runs on.
      sharding_rules: how its parameters and batches lie on them.
      batch_size: captions encoded at a time.
      overwrite: replace an earlier cache at `out`.
      say: is given lines for the user.

    Raises:
      ValueError, FileExistsError: one line, before anything is written.
    """
    if jax.process_count() > 1:
        raise ValueError(f"embed writes from one host, there are {jax.process_count()}: start it on one")
    rules.check_batch_size(batch_size, mesh, sharding_rules)
    captions = read_captions(stored, preparation)
    shape = {"length": TEXT_LENGTH, "width": text.config.d_model, "batch_size": batch_size}
    spec = make_spec(stored, captions, preparation, form=form, encoder=text.sha256, **shape)
    with jax.set_mesh(mesh):
        encode = make_encode(text, mesh, sharding_rules)
        encode([""] * batch_size)  # compiles
        began = time.perf_counter()
        encode([""] * batch_size)
        seconds = (time.perf_counter() - began) * -(-spec.captions // batch_size)
        say(_announce(spec, seconds))
        with tqdm(total=spec.captions, unit="caption", desc="embed") as bar:
            note = write_embeddings(captions, spec, encode, out, overwrite=overwrite, progress=bar.update)
    say(f"{out}: {spec.captions} captions, {form}, {note['bytes_per_caption']:,.0f} bytes each")


def make_encode(text: TextEncoder, mesh: Mesh, sharding_rules: rules.Rules) -> Encode:
    """The encoder in bfloat16 on a mesh, as training runs it: captions -> states (B, L, D) bfloat16, tokens (B,)."""
    module = T5Encoder(text.config, dtype=jnp.bfloat16)
    params = load_params(
        text.params, "bfloat16", rules.state_shardings(boxed_params(text.config), mesh, sharding_rules)
    )
    split = rules.batch_sharding(mesh, sharding_rules)

    def apply(params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        states = module.apply({"params": params}, ids, mask)
        return jnp.asarray(states, jnp.bfloat16)  # of bfloat16 values: nothing is lost

    jitted = jax.jit(apply, in_shardings=(None, split, split), out_shardings=rules.replicated(mesh))

    def encode(captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, mask = text.tokenizer(captions)
        inputs = [
            jax.make_array_from_callback(rows.shape, split, lambda at, rows=rows: rows[at]) for rows in (ids, mask)
        ]
        return np.asarray(jitted(params, *inputs)), mask.sum(1)

    return encode


def _announce(spec: EmbeddingSpec, seconds: float) -> str:
    about = "at most " if spec.form == "exact" else "about "
    length = f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.1f} min"
    return f"{spec.captions} captions, {spec.form}: {about}{spec.raw_bytes / 1e6:,.1f} MB, about {length} to encode"
