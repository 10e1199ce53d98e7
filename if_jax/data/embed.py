"""`if-jax embed`: a frozen text encoder run over all captions of a source, by any number of processes.

Shard s of the cache belongs to process s mod N. Each process encodes its own shards, with the encoder on its own
devices, or all processes encode every shard together, with the encoder on all devices.
"""

from __future__ import annotations

import dataclasses
import math
import signal
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
from if_jax.data.embedding_shards import CacheFolder, Encode, captions_of, make_spec, shard_records
from if_jax.data.embeddings import EmbeddingSpec
from if_jax.data.patterns import expand_home
from if_jax.data.preprocessing import Preparation
from if_jax.data.reading import as_path
from if_jax.data.remote import RemoteSettings
from if_jax.data.sources import Stored
from if_jax.models.t5 import T5Encoder
from if_jax.parallel import hosts, rules
from if_jax.parallel import mesh as meshes
from if_jax.text.tokens import TEXT_LENGTH

_SAMPLE = 64  # records whose captions are counted, to say how many there are about


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
    settings: RemoteSettings = RemoteSettings(),  # noqa: B008 (frozen)
    wait: int = 300,
    say: Callable[[str], Any] = print,
) -> None:
    """Write the cache of a source's captions; about its size and the time it takes are said before it starts.

    All processes of a run call it alike, within `failures.propagated`. What they write is the same bytes whatever their
    number, and the same call goes on after any of them was killed.

    Args:
      stored: the source.
      text: the encoder, with its tokenizer.
      out: the folder to write, which all processes see: a shared disk, or gs://….
      form: one of `embeddings.FORMS`.
      preparation: how captions are prepared.
      mesh: devices the encoder runs on: of this process (`host_mesh`), or those of all.
      sharding_rules: how its parameters and batches lie on them.
      batch_size: captions encoded at a time.
      overwrite: replace an earlier cache at `out`.
      settings: of the bucket that `out` is in.
      wait: seconds for the other processes to come.
      say: is given lines for the user, by process 0.

    Raises:
      ValueError, FileNotFoundError, FileExistsError: one line, before anything is encoded.
    """
    rules.check_batch_size(batch_size, mesh, sharding_rules)
    shape = {"length": TEXT_LENGTH, "width": text.config.d_model, "batch_size": batch_size}
    spec = make_spec(stored, preparation, form=form, encoder=text.sha256, **shape)
    target = CacheFolder(as_path(expand_home(str(out)), settings), spec)
    _embed(stored, text, target, mesh, sharding_rules, overwrite, wait, say)


def host_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, *, sharding_rules: str = "dp") -> Mesh:
    """The mesh of this process's devices: of these sizes where they fit, else all along `fsdp`, or `data` by "dp".

    Args:
      data: devices along the data axis, as a recipe gives them for all processes.
      fsdp: likewise.
      tensor: likewise.
      sharding_rules: name of the rule set.

    Raises:
      ValueError: this process is alone, and the sizes do not fit.
    """
    devices = jax.local_devices()
    try:
        return meshes.make_mesh(data, fsdp, tensor, devices=devices)
    except ValueError:
        if jax.process_count() == 1:
            raise
        return meshes.make_mesh(*((-1, 1, 1) if sharding_rules == "dp" else (1, -1, 1)), devices=devices)


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
        return np.asarray(jitted(params, *hosts.block_on_cpu(inputs))), mask.sum(1)

    return encode


def _embed(
    stored: Stored,
    text: TextEncoder,
    target: CacheFolder,
    mesh: Mesh,
    sharding_rules: rules.Rules,
    overwrite: bool,
    wait: int,
    say: Callable[[str], Any],
) -> None:
    spec, index, count = target.spec, jax.process_index(), jax.process_count()
    together = mesh.size > len(mesh.local_devices)  # all processes encode each shard
    if count > 1:
        # JAX keeps SIGTERM for itself where processes are joined, and it would end nothing.
        signal.signal(signal.SIGTERM, lambda *_: hosts.exit_process("asked to end", hosts.EXIT_TERMINATED))
        agreed = {"code": hosts.code_hash(), "out": str(target.out), **dataclasses.asdict(spec), "together": together}
        hosts.require_same_facts(agreed, wait, topic="embed", while_alive=True)  # some may be indexing still
    if index == 0:
        target.begin(overwrite)
    _meet("begun", wait)
    left = target.open_shards()
    if together:
        hosts.require_same_facts({"shards": hash(tuple(left))}, wait, topic="embed shards")
    mine = [shard for shard in left if together or shard % count == index]
    if mine:
        with jax.set_mesh(mesh):
            encode = make_encode(text, mesh, sharding_rules)
            seconds = _time_batch(encode, spec.batch_size) / (1 if together else count)
            if index == 0:
                say(_announce(stored, spec, left, seconds))
            _write(stored, target, mine, encode)
    _meet("encoded", wait)
    if index == 0:
        manifest = target.close()
        each = f"{manifest['bytes_per_caption']:,.0f} bytes each"
        say(f"{target.out}: {manifest['captions']} captions, {spec.form}, {each}")
    _meet("closed", wait)


def _write(stored: Stored, target: CacheFolder, shards: list[int], encode: Encode) -> None:
    """Encodes shards, and writes those of them that belong to this process."""
    spec, index, count = target.spec, jax.process_index(), jax.process_count()
    total = sum(len(spec.span(shard)) for shard in shards)
    with tqdm(total=total, unit="record", desc="embed", disable=index > 0) as bar:
        for shard in shards:
            records = lambda shard=shard: shard_records(stored, shard, spec, encode, bar.update)  # noqa: E731
            if shard % count == index:
                target.write(shard, records)
            else:
                for _ in records():  # its process keeps them
                    pass


def _meet(stage: str, wait: int) -> None:
    """Returns once every process has come so far; those that are alive are waited for."""
    if jax.process_count() > 1:
        hosts.exchange(f"embed {stage}", {}, wait, while_alive=True)


def _time_batch(encode: Encode, batch_size: int) -> float:
    encode([""] * batch_size)  # compiles
    began = time.perf_counter()
    encode([""] * batch_size)
    return time.perf_counter() - began


def _announce(stored: Stored, spec: EmbeddingSpec, left: list[int], batch_seconds: float) -> str:
    looked_at = range(min(len(stored), _SAMPLE))
    each = sum(map(len, captions_of(stored, looked_at, spec))) / len(looked_at)
    records = sum(len(spec.span(shard)) for shard in left)
    captions = round(each * records)
    share = f", {len(left)} of {spec.shards} shards" if len(left) < spec.shards else ""
    about = "at most " if spec.form == "exact" else "about "
    seconds = batch_seconds * math.ceil(captions / spec.batch_size)
    length = f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.1f} min"
    size = f"{captions * spec.raw_bytes / 1e6:,.1f} MB"
    return f"{captions} captions, {spec.form}{share}: {about}{size}, about {length} to encode"
