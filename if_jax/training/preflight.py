"""What is compared before a run starts: between its processes, and with what its folder holds already."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from if_jax.checkpoints.files import sha256_of
from if_jax.config import Recipe, differences, recipe_to_dict, to_recipe
from if_jax.data import pipeline
from if_jax.data.embeddings import NOTE
from if_jax.models import presets
from if_jax.models.t5 import T5Config
from if_jax.parallel import hosts

# What may change between two sessions of one run: how long, how often, where, and what is looked at.
_FREE = ("steps", "log_every", "checkpoint_every", "keep_", "sample.", "validation.", "mesh.", "hosts.", "wandb")
_FREE += ("data.threads", "data.workers", "init_")


def facts(recipe: Recipe, workdir: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What all processes of a run must have in common: what differs would hang them, or spoil the run."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()[:16]
    found = {"workdir": workdir, "code": hosts.code_hash(), "recipe": digest, "devices": jax.local_device_count()}
    found["data"] = pipeline.describe_files(recipe.data.source)
    if recipe.data.embeddings:
        note = Path(recipe.data.embeddings) / NOTE
        found["embeddings"] = sha256_of(note)[:16] if note.is_file() else "missing"
    if recipe.validation.every:
        found["validation data"] = pipeline.describe_files(recipe.validation.source)
    return found


def check_same_recipe(workdir: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """A run folder belongs to one recipe (both as dicts); ValueError unless only what `_FREE` names has changed."""
    stored = recipe_to_dict(to_recipe(before))  # keys that are newer than the run at their defaults
    changed = {key: pair for key, pair in differences(stored, now).items() if not key.startswith(_FREE)}
    if changed:
        told = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items())
        raise ValueError(f"{workdir} holds a run of another recipe ({told}): use another --workdir or the old values")


def check_text_width(recipe: Recipe, config: T5Config) -> None:
    """ValueError where the frozen text encoder makes states of another width than the UNet reads."""
    wanted = presets.UNETS[recipe.unet].encoder_hid_dim
    if config.d_model != wanted:
        raise ValueError(
            f"text_encoder_from {recipe.text_encoder_from!r} makes states of width {config.d_model}, "
            f"{recipe.unet!r} reads {wanted}: name the release it goes with"
        )
