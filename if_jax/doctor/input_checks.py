"""What a run reads: the frozen text encoder, the weights it starts from, pictures, kept text states."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools

import jax

from if_jax.checkpoints import release
from if_jax.checkpoints.encoders import read_encoders
from if_jax.config import Recipe
from if_jax.data import pipeline
from if_jax.data.discovery import find_record_stores
from if_jax.data.embeddings import Embeddings
from if_jax.data.index import load_index
from if_jax.data.preprocessing import UnusableRecord
from if_jax.data.sources import open_stored
from if_jax.doctor.findings import Finding, attempt
from if_jax.models.conditioning import CLIPShapes
from if_jax.models.t5 import T5Config
from if_jax.training import host_facts
from if_jax.training.stage import unet_config

_LOOKED_AT = 64  # records of a source that has no index yet


@dataclasses.dataclass(frozen=True)
class FrozenText:
    """A frozen text encoder as far as it can be known without reading its weights."""

    config: T5Config | None  # of T5; None where the stage reads CLIP alone, or trains its T5
    sha256: str  # "" where its files do not say
    identity: str  # the same, shortened, or a hash of the tensors' shapes and types
    clip: CLIPShapes | None = None


def text_encoder(recipe: Recipe) -> tuple[Finding, FrozenText | None]:
    """The frozen encoders of a recipe: their files, and that they go with the UNet. T5's weights are not read."""

    def read() -> tuple[str, FrozenText]:
        own = recipe.conditioning
        encoders = read_encoders(recipe.text_encoder_from, recipe.encoders, own.clip_from, identify=False)
        text, clip, messages = encoders.t5, encoders.clip, []
        if text:
            host_facts.check_text_width(recipe, text.config)
            messages.append(
                f"{recipe.text_encoder_from}, {text.config.num_layers} layers of width {text.config.d_model}"
            )
        if clip:
            unet_config(recipe, clip.shapes)
            messages.append(f"CLIP of {own.clip_from or recipe.text_encoder_from}")
        stored = [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(text.params if text else {})]
        sha256 = "" if text and not text.sha256 else encoders.sha256
        identity = sha256 or hashlib.sha256(repr(stored).encode()).hexdigest()
        shapes = clip.shapes if clip else None
        return ", ".join(messages), FrozenText(text.config if text else None, sha256, identity[:16], shapes)

    remedy = "copy it there, or set --config.text_encoder_from=FOLDER"
    return attempt("text encoder", f"{remedy} or --config.conditioning.clip_from=FOLDER", read)


def initial_weights(recipe: Recipe) -> Finding:
    """The stage that `init_from` names."""

    def read() -> tuple[str, None]:
        stage = release.read_stage(recipe.init_from, None)
        if stage.kind != recipe.stage:
            raise ValueError(
                f"init_from {recipe.init_from!r} is a {stage.kind} stage, but recipe key stage is {recipe.stage!r}: "
                "name a stage of that kind"
            )
        return f"{recipe.init_from}, a {stage.kind} stage", None

    return attempt("initial weights", "set --config.init_from=FOLDER of a stage of a release", read)[0]


def data_source(check: str, source: str, recipe: Recipe, workers: int = 0) -> Finding:
    """Whether pictures can be read from every part of a source; one that has no index yet is only looked into.

    Args:
      check: name of the check.
      source: as `data.source` of a recipe.
      recipe: whose `data` section says what is kept.
      workers: processes that are to read it.
    """

    def look() -> tuple[str, None]:
        pipeline.check_workers(source, workers)
        parts = pipeline.stored_parts(source)
        return "; ".join(_part(name, recipe) for name in parts) or f"{source}, drawn on the fly", None

    return attempt(check, "run `if-jax data inspect` on it", look)[0]


def text_states(recipe: Recipe, text: FrozenText | None) -> Finding:
    """The cache that `data.embeddings` names: that it is whole, and of this source and encoder."""

    def read() -> tuple[str, None]:
        cache, data = Embeddings(recipe.data.embeddings, recipe.data.remote), recipe.data
        if len(pipeline.parse_mixture(data.source)) > 1 or not pipeline.stored_parts(data.source):
            raise ValueError(
                f"embeddings {data.embeddings!r} do not go with drawn scenes or a mixture: name one stored source, or "
                "leave data.embeddings out"
            )
        if all(load_index(store) for store in find_record_stores(data.source, data.remote)):
            stored = open_stored(data.source, data.keep.at_least(data.size), exclude=data.exclude, settings=data.remote)
            cache.check(stored, data.preparation, text.sha256 if text else "")
        return f"{data.embeddings}, {cache.captions} captions", None

    return attempt("text states", "run `if-jax embed` again", read)[0]


def _part(name: str, recipe: Recipe) -> str:
    keep = recipe.data.keep.at_least(recipe.data.size)
    stores = find_record_stores(name, recipe.data.remote)
    if all(load_index(store) is not None for store in stores):
        stored = open_stored(name, keep, exclude=recipe.data.exclude, settings=recipe.data.remote)
        return f"{name}: {len(stored):,} pictures"
    records = list(itertools.islice((record for store in stores for _, _, record in store.scan()), _LOOKED_AT))
    flaws = [str(record) for record in records if isinstance(record, UnusableRecord)]
    if len(flaws) == len(records):
        raise ValueError(
            f"no usable picture in {name!r} ({flaws[0] if flaws else 'it is empty'}): `if-jax data inspect {name}` "
            "says what is wrong with each"
        )
    return f"{name}: {len(stores)} part(s), indexed when training starts"
