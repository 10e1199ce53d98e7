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
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from if_jax.checkpoints.stages import Encoders
from if_jax.checkpoints.weights import boxed_params, load_params
from if_jax.data.embedding_shards import CacheFolder, Encode, captions_of, make_spec, shard_records
from if_jax.data.embeddings import EmbeddingSpec
from if_jax.data.patterns import expand_home
from if_jax.data.preprocessing import Preparation
from if_jax.data.reading import as_path
from if_jax.data.remote import RemoteSettings
from if_jax.data.sources import Stored
from if_jax.models.conditioning import StatesPart, clip_text_rows, join, shape_of
from if_jax.models.t5 import T5Encoder
from if_jax.parallel import hosts, rules
from if_jax.parallel import mesh as meshes
from if_jax.text.clip_tokens import CaptionReader
from if_jax.text.tokens import TEXT_LENGTH

_SAMPLE = 64  # records whose captions are counted, to say how many there are about


def embed(
    stored: Stored,
    encoders: Encoders,
    out: str | Path,
    *,
    form: str,
    preparation: Preparation,
    mesh: Mesh,
    sharding_rules: rules.Rules,
    batch_size: int,
    overwrite: bool = False,
    settings: RemoteSettings = RemoteSettings(),  # noqa: B008 (frozen)
    length: int = TEXT_LENGTH,
    parts: tuple[StatesPart, ...] = (),
    wait: int = 300,
    say: Callable[[str], Any] = print,
) -> None:
    """Write the cache of a source's captions; about its size and the time it takes are said before it starts.

    All processes of a run call it alike, within `failures.propagated`. What they write is the same bytes whatever their
    number, and the same call goes on after any of them was killed.

    Args:
      stored: the source.
      encoders: frozen, with their tokenizers; what CLIP says of pictures is not kept.
      out: the folder to write, which all processes see: a shared disk, or gs://….
      form: one of `embeddings.FORMS`.
      preparation: how captions are prepared.
      mesh: devices the encoder runs on: of this process (`host_mesh`), or those of all.
      sharding_rules: how its parameters and batches lie on them.
      batch_size: captions encoded at a time.
      overwrite: replace an earlier cache at `out`.
      settings: of the bucket that `out` is in.
      length: tokens of a caption that T5 reads.
      parts: what the rows of the states are, where others than T5 alone make them.
      wait: seconds for the other processes to come.
      say: is given lines for the user, by process 0.

    Raises:
      ValueError, FileNotFoundError, FileExistsError: one line, before anything is encoded.
    """
    rules.check_batch_size(batch_size, mesh, sharding_rules)
    if parts and form == "compact":
        raise ValueError("form 'compact' keeps the tokens of one text encoder: use exact for several")
    if not parts and encoders.t5 is None:
        raise ValueError("there is no frozen text encoder whose states can be kept")
    rows, width = shape_of(parts) if parts else (length, encoders.t5.config.d_model if encoders.t5 else 0)
    shape = {"length": rows, "width": width, "batch_size": batch_size}
    spec = make_spec(stored, preparation, form=form, encoder=encoders.sha256, **shape)
    target = CacheFolder(as_path(expand_home(str(out)), settings), spec)
    encode = partial(make_encode, encoders, mesh, sharding_rules, length=length, parts=parts)
    _embed(stored, encode, target, mesh, overwrite, wait, say)


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


def make_encode(
    encoders: Encoders,
    mesh: Mesh,
    sharding_rules: rules.Rules,
    *,
    length: int = TEXT_LENGTH,
    parts: tuple[StatesPart, ...] = (),
) -> Encode:
    """The encoders in bfloat16 on a mesh, as training runs them: captions -> states (B, L, D) bfloat16, tokens (B,).

    The arguments are those of `embed`.
    """
    t5, clip, dtype = encoders.t5, encoders.clip, jnp.dtype("bfloat16")
    text = clip.shapes.text if clip else None
    networks: dict[str, tuple[Any, Any]] = {"text_encoder": (t5.config, t5.params)} if t5 else {}
    if clip and text:
        networks["clip_text"] = (text, clip.params["clip_text"])
    params = {
        name: load_params(own, "bfloat16", rules.state_shardings(boxed_params(config), mesh, sharding_rules))
        for name, (config, own) in networks.items()
    }
    split = rules.batch_sharding(mesh, sharding_rules)
    read = CaptionReader(t5.tokenizer if t5 else None, clip.tokenizer if clip else None, length)

    def apply(params: Any, *arrays: jax.Array) -> jax.Array:
        rows = []
        if t5:
            rows.append(T5Encoder(t5.config, dtype=dtype).apply({"params": params["text_encoder"]}, *arrays[:2]))
        if text:
            rows += clip_text_rows(text, params["clip_text"], arrays[-1], dtype)
        return jnp.asarray(join(parts, rows) if parts else rows[0], dtype)  # of T5 nothing is lost: it is bfloat16

    jitted = jax.jit(apply, in_shardings=(None, *(split for _ in read.names)), out_shardings=rules.replicated(mesh))

    def encode(captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        arrays = dict(zip(read.names, read(captions), strict=True))
        inputs = [
            jax.make_array_from_callback(rows.shape, split, lambda at, rows=rows: rows[at]) for rows in arrays.values()
        ]
        tokens = arrays["mask"].sum(1) if t5 else np.full(len(captions), length)
        return np.asarray(jitted(params, *hosts.block_on_cpu(inputs))), tokens

    return encode


def _embed(
    stored: Stored,
    open_encoders: Callable[[], Encode],
    target: CacheFolder,
    mesh: Mesh,
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
            encode = open_encoders()
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
