"""From runs to a release: the EMA weights of each stage's newest checkpoint, joined into one cascade."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from if_jax.checkpoints import lora, release, run, words
from if_jax.checkpoints.encoders import read_encoders
from if_jax.checkpoints.stages import Encoders, StageRelease, with_text
from if_jax.checkpoints.tensors import Storage
from if_jax.checkpoints.weights import Params, load_params, text_encoder_sha256
from if_jax.config import Recipe, recipe_to_dict
from if_jax.models import presets
from if_jax.text.tokens import load_tokenizer
from if_jax.training.card import model_card
from if_jax.training.posthoc import reconstruct
from if_jax.training.resume import stored_recipe
from if_jax.training.stage import make_stage, stage_defaults
from if_jax.training.warm_start import open_base


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
    ema_length: float | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the newest EMA weights of runs as a release.

    A base stage, alone or followed by others, becomes a cascade; a super-resolution run alone a stage folder. How a
    stage draws by default comes from its recipe's `sample` section. Recipe and step go into the weight files and the
    model card README.md.

    Args:
      runs: work folders of stage I, II, …; one may be the stage folder of a release, which is taken as it is.
      folder: the release to write.
      storage: precision and sizes of the weight files; None: float32, one file.
      steps: by stage, replace what the recipes say.
      guidance: likewise.
      noise_level: by stage after the first, replaces what the recipes say.
      scores: measured figures for the model card, see `model_card`.
      ema_decay: which average ("0.999"); "": the recipe's first.
      ema_length: or the length of an average that is made of the runs' snapshots, see `posthoc`.
      overwrite: whether a release that is there already is replaced.

    Raises:
      FileNotFoundError: a run without a finished checkpoint.
      ValueError: stages that do not belong together, or a folder that exists.
    """
    _check_counts(len(runs), {"steps": steps, "guidance": guidance}, noise_level)
    stages, defaults, recipes, trained = [], [], [], []
    smaller = 0
    rows = zip_longest(runs, steps, guidance, (None, *noise_level))
    for workdir, stage_steps, stage_guidance, stage_level in rows:
        released = (Path(workdir) / "model_index.json").is_file()
        stage, recipe = _released_stage(workdir) if released else _stage_of_run(workdir, ema_decay, ema_length)
        _check_enlarged(workdir, recipe, smaller)
        smaller = recipe.data.size
        recipes.append(recipe_to_dict(recipe))
        stages.append(stage)
        trained.append(int(stage.notes["step"]))
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
        if steps or guidance or scores:
            raise ValueError(
                f"{runs[0]} is a {stages[0].kind} run: alone it becomes a stage folder, which holds neither defaults "
                "nor a card; leave out steps, guidance and scores, or give the run of stage I first"
            )
        release.write_stage(folder, stages[0], storage, overwrite)
        return
    card = model_card(Path(folder).name, stages, defaults, recipes, trained, scores)
    release.write_cascade(folder, stages, defaults, storage=storage, overwrite=overwrite, card=card)


def _stage_of_run(workdir: str, decay: str, length: float | None) -> tuple[StageRelease, Recipe]:
    """A stage of a run's averaged weights, with notes of where they come from."""
    step, metadata, ema = _average(workdir, decay, length)
    recipe = stored_recipe(workdir, metadata)
    notes = {"recipe": json.dumps(recipe_to_dict(recipe), sort_keys=True), "step": str(step)}
    notes |= {} if length is None else {"ema_length": f"{length:g}"}
    if recipe.distill.method:
        notes |= {"teacher": recipe.distill.teacher, "teacher_sha256": metadata["teacher_sha256"]}
    return dataclasses.replace(_trained_stage(workdir, recipe, ema, metadata), notes=notes), recipe


def _released_stage(folder: str) -> tuple[StageRelease, Recipe]:
    """A stage that was released before, as it is; its notes say what it was trained on."""
    stage = release.read_stage(folder)
    if not {"recipe", "step"} <= stage.notes.keys():
        raise ValueError(f"{folder} does not say by which recipe it was trained: give the run, or a release of if_jax")
    return stage, stored_recipe(folder, {"recipe": json.loads(stage.notes["recipe"])})


def _average(workdir: str, decay: str, length: float | None) -> tuple[int, Mapping[str, Any], Params]:
    """Step, metadata and averaged weights: an average of the newest checkpoint, or one made of snapshots."""
    if length is None:
        return run.read_ema(workdir, decay)
    if decay:
        raise ValueError(f"ema_decay {decay} and ema_length {length} name two averages: give one of them")
    made = reconstruct(workdir, length)
    return made.step, made.metadata, made.params


def _check_enlarged(workdir: str, recipe: Recipe, smaller: int) -> None:
    """A stage behind another enlarges pictures of the size it was trained to; `smaller` is 0 for the first run."""
    if smaller and recipe.stage == "super-resolution" and recipe.data.low_size != smaller:
        raise ValueError(
            f"{workdir} was trained to enlarge pictures of {recipe.data.low_size} px (data.low_size), but the "
            f"stage before it draws {smaller} px: train one of them again"
        )


def _check_counts(runs: int, by_stage: Mapping[str, Sequence], noise_level: Sequence[int]) -> None:
    """Values for stages that are not there are refused."""
    for name, values in by_stage.items():
        if len(values) > runs:
            raise ValueError(f"{name} is given {len(values)} times for {runs} run(s): give one for each stage")
    if len(noise_level) > runs - 1:
        raise ValueError(
            f"noise_level is given {len(noise_level)} times: {runs - 1} of the runs come after stage I and take it"
        )


def publish_lora(
    workdir: str, place: str, *, dtype: str = "float32", ema_decay: str = "", overwrite: bool = False
) -> Path:
    """Writes the newest EMA factors of a LoRA run as a file that `load_lora_weights` of stock diffusers opens.

    Args:
      workdir: of the run.
      place: the file (`….safetensors`), or the folder that gets `pytorch_lora_weights.safetensors`.
      dtype: precision of the factors.
      ema_decay: as for `publish`.
      overwrite: whether a file that is there already is replaced.

    Returns:
      The file.

    Raises:
      FileNotFoundError: the run has no finished checkpoint.
      ValueError: it is no run of a LoRA, or the file exists.
    """
    step, metadata, ema = run.read_ema(workdir, ema_decay)
    recipe = stored_recipe(workdir, metadata)
    if not recipe.lora.rank:
        raise ValueError(f"{workdir} has trained all weights, not a LoRA: leave out --lora to export a release")
    path = Path(place) if place.endswith(".safetensors") else Path(place) / lora.FILE_NAME
    notes = {"recipe": json.dumps(recipe_to_dict(recipe), sort_keys=True), "step": str(step), "stage": recipe.stage}
    alpha = recipe.lora.scale * recipe.lora.rank
    lora.write_lora(path, ema, alpha, dtype=dtype, notes=notes, overwrite=overwrite)
    return path


def publish_words(workdir: str, place: str, *, ema_decay: str = "", overwrite: bool = False) -> Path:
    """Writes the newest EMA rows of a run of new words as a file, as diffusers' textual inversion does.

    Args:
      workdir: of the run.
      place: the file (`….safetensors`), or the folder that gets `learned_embeds.safetensors`.
      ema_decay: as for `publish`.
      overwrite: whether a file that is there already is replaced.

    Returns:
      The file.

    Raises:
      FileNotFoundError: the run has no finished checkpoint.
      ValueError: it has trained no words, or the file exists.
    """
    step, metadata, ema = run.read_ema(workdir, ema_decay)
    recipe = stored_recipe(workdir, metadata)
    if not recipe.new_words.tokens:
        raise ValueError(f"{workdir} has trained no new words: leave out --new-words to export a release")
    path = Path(place) if place.endswith(".safetensors") else Path(place) / words.FILE_NAME
    rows = dict(zip(recipe.new_words.tokens, ema["text_encoder"]["shared"]["embedding"], strict=True))
    notes = {"recipe": json.dumps(recipe_to_dict(recipe), sort_keys=True), "step": str(step)}
    words.write_words(path, rows, notes, overwrite=overwrite)
    return path


def _trained_stage(workdir: str, recipe: Recipe, ema: Params, metadata: Mapping[str, Any]) -> StageRelease:
    """A stage with its text encoder: trained with it, or (base stage, frozen encoder) read again and checked.

    The factors of a LoRA go into the weights that they were trained beside, new words into the text encoder.
    """
    sha256 = metadata.get("text_encoder_sha256") or None
    if recipe.keeps_base:
        base, identity = open_base(recipe)
        if identity != metadata["base_sha256"]:
            raise ValueError(f"init_from {recipe.init_from!r} is not the net that {workdir} was trained beside")
        ema = {**ema, "unet": lora.with_factors(base, ema["unet"], recipe.lora.scale) if recipe.lora.rank else base}
    encoders, later = Encoders(), recipe.stage == "super-resolution"
    if not later or recipe.encoders != ("t5",):  # a later stage keeps no T5, nor needs to know more than its hash
        encoders = _read_encoders(recipe, sha256)
    clip = encoders.clip
    stage = make_stage(recipe, ema["unet"], clip.shapes if clip else None)
    if later:
        return dataclasses.replace(stage, text_encoder_sha256=sha256)
    stage = dataclasses.replace(stage, clip=clip)
    if recipe.trains_text:
        config, tokenizer = presets.T5_ENCODERS[recipe.text_encoder], load_tokenizer("bytes")
        return dataclasses.replace(stage, text_config=config, text_params=ema["text_encoder"], tokenizer=tokenizer)
    if encoders.t5 is None:
        return stage
    text = dataclasses.replace(encoders.t5, params=load_params(encoders.t5.params))
    if recipe.new_words.tokens:
        text = words.with_words(text, recipe.new_words.tokens)
        text = words.with_rows(text, ema["text_encoder"]["shared"]["embedding"])
        text = dataclasses.replace(text, sha256=text_encoder_sha256(text.params))
    if recipe.lora.text_encoder:
        adapted = lora.with_factors(text.params, ema["text_encoder"], recipe.lora.scale)
        text = dataclasses.replace(text, params=adapted, sha256=text_encoder_sha256(adapted))
    return with_text(stage, text)


def _read_encoders(recipe: Recipe, sha256: str | None) -> Encoders:
    """The frozen encoders of a run, which must be those that it was trained with."""
    clip_from = recipe.conditioning.clip_from
    encoders = read_encoders(recipe.text_encoder_from, recipe.encoders, clip_from)
    if encoders.sha256 != (sha256 or ""):
        places = (("text_encoder_from", recipe.text_encoder_from), ("conditioning.clip_from", clip_from))
        named = " with ".join(f"{key} {place!r}" for key, place in places if place)
        raise ValueError(f"{named} is not the encoder this run was trained with")
    return encoders
