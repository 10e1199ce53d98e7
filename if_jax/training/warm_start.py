"""Training that starts from released weights: all of a stage, or the part whose names a pattern picks.

A LoRA leaves them as they are and trains beside them, and so do new words; a student starts as a copy of its teacher,
which it keeps beside it: `open_frozen_unet`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from if_jax.checkpoints import release
from if_jax.checkpoints.cascade_folders import stage_folder
from if_jax.checkpoints.files import sha256_of
from if_jax.checkpoints.scheduler import SchedulerConfig
from if_jax.checkpoints.stages import StageRelease
from if_jax.checkpoints.tensors import weight_files
from if_jax.checkpoints.weights import STEMS, Params, abstract_params, load_params
from if_jax.config import Recipe
from if_jax.diffusion.schedule import cosine_betas, schedule_from_betas
from if_jax.models import presets
from if_jax.text.tokens import ByteTokenizer
from if_jax.training.stage import make_scheduler


def start_from_release(recipe: Recipe, abstract: Params, fresh: Callable[[], Params]) -> Params:
    """The parameters a run starts with: those of the stage folder `init_from`, read straight to their places.

    Args:
      recipe: its `init_only` is a pattern for names such as "unet/mid_block/resnets_0/conv1/kernel".
      abstract: {"unet", and "text_encoder" where it is trained}: shapes and shardings.
      fresh: makes random weights, used for what `init_only` leaves out.

    Raises:
      ValueError: the release is of another kind or shape, or the pattern picks nothing; it was trained for another
        prediction, schedule or text encoder, and no `init_only` asks for its weights all the same.
    """
    stage = _open_stage(recipe)
    stored = {"unet": stage.unet_params, "text_encoder": stage.text_params or {}}
    released: dict[str, Any] = dict(flatten_dict(stored, sep="/"))
    wanted: dict[str, Any] = dict(flatten_dict(abstract, sep="/"))
    chosen = [name for name in wanted if re.search(recipe.init_only, name)]
    if not chosen:
        raise ValueError(f"recipe key init_only is {recipe.init_only!r}: no weight has such a name, see the run's log")
    for name in chosen:
        if name not in released and name.startswith("text_encoder/") and stage.text_params is None:
            raise ValueError(f"{_where(recipe)} holds no text encoder: set text_encoder_from as well")
        _check_shape(recipe, name, wanted, released, "choose what fits with init_only")
    params: dict[str, Any] = dict(flatten_dict(fresh(), sep="/")) if len(chosen) < len(wanted) else {}
    for name in chosen:
        params[name] = load_params(released[name], "float32", wanted[name].sharding)
    logging.info("%d of %d tensors start from %s", len(chosen), len(wanted), recipe.init_from)
    return unflatten_dict({name: params[name] for name in wanted}, sep="/")


def with_start(recipe: Recipe) -> Recipe:
    """The recipe with what it starts from: a student without an `init_from` starts as its teacher."""
    if not recipe.distill.method or recipe.init_from:
        return recipe
    return dataclasses.replace(recipe, init_from=_teacher_folder(recipe))


def open_frozen_unet(recipe: Recipe) -> tuple[Params | None, dict[str, str]]:
    """Opens the UNet that is used as it is: that of a LoRA or of new words, or a teacher.

    Args:
      recipe: what is trained.

    Returns:
      Its parameters, a tree of `Lazy`, and what checkpoints remember of it: "base_sha256" or "teacher_sha256"; None and
      nothing where there is none.

    Raises:
      FileNotFoundError, ValueError: see `open_base`.
    """
    if recipe.distill.method:
        params, identity = open_teacher(recipe)
        return params, {"teacher_sha256": identity}
    if not recipe.keeps_base:
        return None, {}
    params, identity = open_base(recipe)
    return params, {"base_sha256": identity}


def open_teacher(recipe: Recipe) -> tuple[Params, str]:
    """Opens the UNet of `distill.teacher`: arguments, result and errors as of `open_base`.

    Raises:
      ValueError: besides, it draws pictures of another size, or bounds them otherwise.
    """
    own = dataclasses.replace(recipe, init_from=_teacher_folder(recipe), init_only="")
    stage, scheduler = _open_stage(own), make_scheduler(recipe)
    size, bounds = stage.unet_config.sample_size, ("sample_max_value", "dynamic_thresholding_ratio")
    if size != recipe.data.size:
        raise ValueError(
            f"{_where(own)} draws {size} px, but recipe key data.size is {recipe.data.size}: set data.size={size}"
        )
    for name in bounds:
        here, there = getattr(scheduler, name), getattr(stage.scheduler, name)
        if here != there:
            raise ValueError(f"{_where(own)} draws with {name} {there:g}, this recipe with {here:g}: they must be one")
    return open_base(own)


def _teacher_folder(recipe: Recipe) -> str:
    """The stage folder `distill.teacher`, or that of the stage of its size in a cascade."""
    return str(stage_folder(Path(recipe.distill.teacher), recipe.data.size))


def open_base(recipe: Recipe) -> tuple[Params, str]:
    """Opens the UNet of the stage folder `init_from`, which is used as it is by a LoRA or new words.

    Args:
      recipe: what is trained.

    Returns:
      Its parameters, a tree of `Lazy`, and their identity: SHA-256 of their files.

    Raises:
      ValueError: the release is of another kind or shape, or was trained for something else.
    """
    stored = _open_stage(recipe).unet_params
    wanted: dict[str, Any] = dict(flatten_dict(abstract_params(presets.UNETS[recipe.unet]), sep="/"))
    released: dict[str, Any] = dict(flatten_dict(stored, sep="/"))
    for name in wanted:
        _check_shape(recipe, name, wanted, released, "name the release of this net")
    files = weight_files(Path(recipe.init_from) / "unet", STEMS["unet"])
    return stored, hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()


def _open_stage(recipe: Recipe) -> StageRelease:
    """The stage `init_from`: of the recipe's kind, and trained for the same unless `init_only` takes it anyway."""
    stage = release.read_stage(recipe.init_from, None)
    if stage.kind != recipe.stage:
        raise ValueError(f"{_where(recipe)} is a {stage.kind} stage, but recipe key stage is {recipe.stage!r}")
    if differences := _differences(recipe, stage):
        message = f"{_where(recipe)} was trained otherwise: {'; '.join(differences)}"
        if recipe.keeps_base or recipe.distill.method:
            raise ValueError(message)
        if not recipe.init_only:
            raise ValueError(f"{message}; or set init_only=. to start from its weights all the same")
        logging.warning("%s", message)
    return stage


def _where(recipe: Recipe) -> str:
    if recipe.distill.method and recipe.init_from == _teacher_folder(recipe):
        return f"distill.teacher {recipe.distill.teacher!r}"
    return f"init_from {recipe.init_from!r}"


def _check_shape(
    recipe: Recipe, name: str, wanted: Mapping[str, Any], released: Mapping[str, Any], remedy: str
) -> None:
    here, there = wanted[name].shape, getattr(released.get(name), "shape", None)
    if here != there:
        difference = "is missing there" if there is None else f"has shape {there} there"
        raise ValueError(
            f"{_where(recipe)} holds a net of another shape than {recipe.unet!r}: {name} {difference}, {here} here; "
            f"{remedy}"
        )


def _differences(recipe: Recipe, stage: StageRelease) -> list[str]:
    """What the weights of a stage mean otherwise than the recipe would have it, each with what to do."""
    own, theirs = make_scheduler(recipe), stage.scheduler
    differences = []
    if own.prediction != theirs.prediction:
        differences.append(
            f"it predicts {theirs.prediction!r}, recipe key prediction is {recipe.prediction!r} (set "
            f"prediction={theirs.prediction})"
        )
    if not np.allclose(own.schedule().alpha_bar, theirs.schedule().alpha_bar, rtol=1e-4):
        sizes = [size for size in (32, 64, 128, 256, 512, 1024) if _noised_for(theirs, size)]
        remedy = f"set noise_size={sizes[0]}" if sizes else "no noise_size makes its schedule"
        differences.append(
            f"its noise schedule is another one than that of recipe key noise_size {recipe.noise_size} ({remedy})"
        )
    if recipe.text_encoder_from:
        text = release.read_text_encoder(recipe.text_encoder_from, None, identify=False)
        if text.sha256 and stage.text_encoder_sha256 and text.sha256 != stage.text_encoder_sha256:
            differences.append(
                f"it reads another text encoder ({stage.text_encoder_sha256[:12]}) than that of text_encoder_from "
                f"{recipe.text_encoder_from!r} ({text.sha256[:12]}) (name the release it came with)"
            )
    elif stage.tokenizer is not None and stage.tokenizer.class_name != ByteTokenizer.class_name:
        differences.append(
            f"its captions are cut by {stage.tokenizer.class_name}, those of this recipe to bytes (set "
            f"text_encoder_from={recipe.init_from})"
        )
    return differences


def _noised_for(scheduler: SchedulerConfig, size: int) -> bool:
    made = schedule_from_betas(cosine_betas(size=size)).alpha_bar
    return np.allclose(scheduler.schedule().alpha_bar, made, rtol=1e-4)
