"""What is compared between the processes of a run before it starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax

from if_jax.config import Recipe
from if_jax.data import pipeline
from if_jax.data.embeddings import NOTE, Embeddings
from if_jax.data.index import Filter
from if_jax.data.reading import as_path, read_file
from if_jax.models import presets
from if_jax.models.t5 import T5Config
from if_jax.parallel import hosts


def facts(recipe: Recipe, workdir: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What all processes of a run must have in common: what differs would hang them, or spoil the run.

    Args:
      recipe: what is trained.
      workdir: folder of the run.
      metadata: of its checkpoints.

    Returns:
      Facts by name, JSON values: hashes stand for what is large.
    """
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()[:16]
    shared = {"workdir": workdir, "code": hosts.code_hash(), "recipe": digest, "devices": jax.local_device_count()}
    shared["data"] = pipeline.describe_files(recipe.data.source, recipe.data.remote)
    if recipe.data.embeddings:
        note = as_path(recipe.data.embeddings, recipe.data.remote) / NOTE
        shared["embeddings"] = hashlib.sha256(read_file(note)).hexdigest()[:16] if note.is_file() else "missing"
    if recipe.validation.every:
        shared["validation data"] = pipeline.describe_files(recipe.validation.source, recipe.data.remote)
    return shared


def data_facts(recipe: Recipe, source: pipeline.Source) -> dict[str, str]:
    """Content of what a run reads, wherever it is stored: what its checkpoints keep, and processes have in common.

    Args:
      recipe: what is trained.
      source: its pictures and captions, opened.

    Returns:
      "data" and, where text states are kept, "embeddings": JSON values.
    """
    known = {"data": source.fingerprint()}
    if recipe.data.embeddings:
        known["embeddings"] = Embeddings(recipe.data.embeddings, recipe.data.remote).fingerprint()
    return known


def validation_facts(recipe: Recipe) -> dict[str, str]:
    """Content of the pictures a run is validated on: every process reads all of them."""
    if not recipe.validation.every:
        return {}
    validation, data = recipe.validation, recipe.data
    arguments = (data.size, validation.seed, data.preparation, Filter(), data.remote, data.exclude)
    opened = pipeline.open_source(validation.source, *arguments)
    return {"validation data": opened.fingerprint()}


def check_text_width(recipe: Recipe, config: T5Config) -> None:
    """Checks that a frozen text encoder goes with the recipe's UNet.

    Raises:
      ValueError: it makes states of another width than the UNet reads.
    """
    wanted = presets.UNETS[recipe.unet].encoder_hid_dim
    if config.d_model != wanted:
        raise ValueError(
            f"text_encoder_from {recipe.text_encoder_from!r} makes states of width {config.d_model}, "
            f"{recipe.unet!r} reads {wanted}: name the release it goes with"
        )
