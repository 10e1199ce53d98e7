"""From runs to a release: the EMA weights of each stage's newest checkpoint, joined into one cascade."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from if_jax.checkpoints import release, run
from if_jax.checkpoints.stages import StageRelease
from if_jax.checkpoints.tensors import Storage
from if_jax.checkpoints.weights import Params
from if_jax.config import Recipe, recipe_to_dict
from if_jax.models import presets
from if_jax.text.tokens import load_tokenizer
from if_jax.training.card import model_card
from if_jax.training.resume import stored_recipe
from if_jax.training.stage import make_stage, stage_defaults


def publish(
    runs: Sequence[str],
    folder: str,
    *,
    storage: Storage | None = None,
    steps: Sequence[str] = (),
    guidance: Sequence[float] = (),
    noise_level: Sequence[int] = (),
    scores: Mapping[str, Any] | None = None,
    ema_decay: str = "",
    overwrite: bool = False,
) -> None:
    """Writes the newest EMA weights of runs as a release.

    A base stage, alone or followed by others, becomes a cascade; a super-resolution run alone a stage folder. How a
    stage draws by default comes from its recipe's `sample` section. Recipe and step go into the weight files and the
    model card README.md.

    Args:
      runs: work folders of stage I, II, ….
      folder: the release to write.
      storage: precision and sizes of the weight files; None: float32, one file.
      steps, guidance: by stage, replace what the recipes say.
      noise_level: by stage after the first, replaces what the recipes say.
      scores: measured figures for the model card, see `model_card`.
      ema_decay: which average ("0.999"); "": the recipe's first.
      overwrite: whether a release that is there already is replaced.

    Raises:
      FileNotFoundError: a run without a finished checkpoint.
      ValueError: stages that do not belong together, or a folder that exists.
    """
    stages, defaults, recipes, trained = [], [], [], []
    rows = zip_longest(runs, steps[: len(runs)], guidance[: len(runs)], (None, *noise_level)[: len(runs)])
    for workdir, stage_steps, stage_guidance, stage_level in rows:
        step, metadata, ema = run.read_ema(workdir, ema_decay)
        recipe = stored_recipe(workdir, metadata)
        stage = _trained_stage(recipe, ema, metadata.get("text_encoder_sha256") or None)
        recipes.append(recipe_to_dict(recipe))
        notes = {"recipe": json.dumps(recipes[-1], sort_keys=True), "step": str(step)}
        stages.append(dataclasses.replace(stage, notes=notes))
        trained.append(step)
        default = stage_defaults(recipe)
        defaults.append(
            dataclasses.replace(
                default,
                sample_timestep_respacing=stage_steps or default.sample_timestep_respacing,
                guidance_scale=default.guidance_scale if stage_guidance is None else stage_guidance,
                noise_level=default.noise_level if stage_level is None else stage_level,
            )
        )
    if len(stages) == 1 and stages[0].kind != "base":
        release.write_stage(folder, stages[0], storage, overwrite)
        return
    card = model_card(Path(folder).name, stages, defaults, recipes, trained, scores)
    release.write_cascade(folder, stages, defaults, storage=storage, overwrite=overwrite, card=card)


def _trained_stage(recipe: Recipe, ema: Params, sha256: str | None) -> StageRelease:
    """A stage with its text encoder: trained with it, or (base stage, frozen encoder) read again and checked."""
    stage = dataclasses.replace(make_stage(recipe, ema["unet"]), text_encoder_sha256=sha256)
    if recipe.stage == "super-resolution":
        return stage
    if not recipe.text_encoder_from:
        config, tokenizer = presets.T5_ENCODERS[recipe.text_encoder], load_tokenizer("bytes")
        return dataclasses.replace(stage, text_config=config, text_params=ema["text_encoder"], tokenizer=tokenizer)
    text = release.read_text_encoder(recipe.text_encoder_from)
    if text.sha256 != sha256:
        raise ValueError(f"text_encoder_from {recipe.text_encoder_from!r} is not the encoder this run was trained with")
    return dataclasses.replace(stage, text_config=text.config, text_params=text.params, tokenizer=text.tokenizer)
