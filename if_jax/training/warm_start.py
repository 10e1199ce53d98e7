"""Training that starts from released weights: all of a stage, or the part whose names a pattern picks."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from if_jax.checkpoints import release
from if_jax.checkpoints.weights import Params, load_params
from if_jax.config import Recipe


def start_from_release(recipe: Recipe, abstract: Params, fresh: Callable[[], Params]) -> Params:
    """The parameters a run starts with: those of the stage folder `init_from`, read straight to their places.

    Args:
      recipe: its `init_only` is a pattern for names such as "unet/mid_block/resnets_0/conv1/kernel".
      abstract: {"unet", and "text_encoder" where it is trained}: shapes and shardings.
      fresh: makes random weights, used for what `init_only` leaves out.

    Raises:
      ValueError: the release is of another kind or shape, or the pattern picks nothing.
    """
    where = f"init_from {recipe.init_from!r}"
    stage = release.read_stage(recipe.init_from, None)
    if stage.kind != recipe.stage:
        raise ValueError(f"{where} is a {stage.kind} stage, but recipe key stage is {recipe.stage!r}")
    stored = {"unet": stage.unet_params, "text_encoder": stage.text_params or {}}
    released: dict[str, Any] = dict(flatten_dict(stored, sep="/"))
    wanted: dict[str, Any] = dict(flatten_dict(abstract, sep="/"))
    chosen = [name for name in wanted if re.search(recipe.init_only, name)]
    if not chosen:
        raise ValueError(f"recipe key init_only is {recipe.init_only!r}: no weight has such a name, see the run's log")
    for name in chosen:
        if name not in released and name.startswith("text_encoder/") and stage.text_params is None:
            raise ValueError(f"{where} holds no text encoder: set text_encoder_from as well")
        here, there = wanted[name].shape, getattr(released.get(name), "shape", None)
        if here != there:
            difference = "is missing there" if there is None else f"has shape {there} there"
            raise ValueError(
                f"{where} holds a net of another shape than {recipe.unet!r}: {name} {difference}, {here} here; "
                "choose what fits with init_only"
            )
    params: dict[str, Any] = dict(flatten_dict(fresh(), sep="/")) if len(chosen) < len(wanted) else {}
    for name in chosen:
        params[name] = load_params(released[name], "float32", wanted[name].sharding)
    logging.info("%d of %d tensors start from %s", len(chosen), len(wanted), recipe.init_from)
    return unflatten_dict({name: params[name] for name in wanted}, sep="/")
