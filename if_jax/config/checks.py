"""What the keys of a recipe must be to each other; what each may be by itself stands at the key."""

from __future__ import annotations

import dataclasses
import re

from if_jax.checkpoints.files import parse_bytes
from if_jax.checkpoints.weights import abstract_params
from if_jax.config.keys import ConditioningConfig, DistillConfig, LoraConfig, Recipe, ValidationConfig
from if_jax.models import presets
from if_jax.models.conditioning import ENCODERS
from if_jax.models.copy_start import check_copy
from if_jax.models.lora import check_rank, kernels_of, target_paths
from if_jax.text.captions import prepare_captions


def check(recipe: Recipe) -> None:
    """Refuses a recipe that cannot work.

    Raises:
      ValueError: names the key, its value and what would do.
    """
    _check_training(recipe)
    _check_validation(recipe.validation)
    _check_start(recipe)
    _check_data(recipe)
    _check_networks(recipe)
    _check_conditioning(recipe)
    _check_beside(recipe)
    _check_lora(recipe)
    _check_new_words(recipe)
    _check_distill(recipe)
    _check_sides(recipe)


def _check_training(recipe: Recipe) -> None:
    if recipe.checkpoint_every % recipe.log_every:  # a resumed run must repeat whole windows of the log
        raise ValueError(
            f"recipe key checkpoint_every is {recipe.checkpoint_every}: "
            f"it must be a multiple of log_every {recipe.log_every}"
        )
    if recipe.batch_size % recipe.accumulate:
        raise ValueError(f"recipe key accumulate is {recipe.accumulate}: it must divide batch_size {recipe.batch_size}")
    if not recipe.ema_decays:
        raise ValueError("recipe key ema_decays is empty: give at least one decay, such as 0.9999")
    if len(recipe.posthoc_ema.lengths) == 1:
        raise ValueError(
            f"recipe key posthoc_ema.lengths is {recipe.posthoc_ema.lengths}: averages of other lengths are made of at "
            "least two, such as 0.05 and 0.1"
        )
    factor = recipe.guard.spike_factor
    if 0 < factor <= 1:
        raise ValueError(
            f"recipe key guard.spike_factor is {factor}: usual gradients would count as spikes; "
            "it must be above 1, or 0 to leave out only what is not finite"
        )
    if recipe.sample.every and not recipe.sample.prompts:
        raise ValueError(
            "recipe key sample.prompts is empty: give at least one prompt, or set sample.every=0 to draw none"
        )


def _check_start(recipe: Recipe) -> None:
    try:
        re.compile(recipe.init_only)
    except re.error as error:
        raise ValueError(f"recipe key init_only is {recipe.init_only!r}: no regular expression ({error})") from None
    if recipe.init_only and not recipe.init_from:
        raise ValueError(f"recipe key init_only is {recipe.init_only!r} without init_from: name the stage folder too")
    if not recipe.init_copy:
        return
    if recipe.stage != "super-resolution" or recipe.prediction != "x0":
        raise ValueError(
            f"recipe key init_copy is set with stage {recipe.stage!r} and prediction {recipe.prediction!r}: only a "
            "super-resolution net that predicts x0 can start as a copy"
        )
    if recipe.init_from:
        raise ValueError(f"recipe key init_copy is set with init_from {recipe.init_from!r}: choose one of them")
    try:
        check_copy(presets.UNETS[recipe.unet])
    except ValueError as error:
        raise ValueError(f"recipe key init_copy with unet {recipe.unet!r}: {error}") from None


def _check_networks(recipe: Recipe) -> None:
    unet, super_resolution = presets.UNETS[recipe.unet], recipe.stage == "super-resolution"
    if unet.aug_level_embedding != super_resolution:
        kind = "super-resolution" if unet.aug_level_embedding else "base"
        raise ValueError(f"recipe key unet is {recipe.unet!r}, a {kind} net, but stage is {recipe.stage!r}")
    if super_resolution and not recipe.text_encoder_from:
        raise ValueError("recipe key text_encoder_from is empty: name the release folder whose encoder this stage uses")
    width = presets.T5_ENCODERS[recipe.text_encoder].d_model
    if recipe.trains_text and width != unet.encoder_hid_dim:
        raise ValueError(
            f"recipe key text_encoder is {recipe.text_encoder!r} of width {width}, but {recipe.unet!r} "
            f"reads states of width {unet.encoder_hid_dim}"
        )


def _check_conditioning(recipe: Recipe) -> None:
    own, default = recipe.conditioning, ConditioningConfig()
    for encoder in ENCODERS:
        share = getattr(own, f"{encoder}_dropout")
        if encoder not in recipe.encoders and share != getattr(default, f"{encoder}_dropout"):
            raise ValueError(
                f"recipe key conditioning.{encoder}_dropout is {share}, but conditioning.encoders {own.encoders!r} has "
                f"no {encoder}: add it, or leave the share out"
            )
    if recipe.encoders == ("t5",):
        if own.t5_dropout:
            raise ValueError(
                f"recipe key conditioning.t5_dropout is {own.t5_dropout} with T5 alone: data.caption_dropout drops "
                "captions"
            )
        if own.clip_from:
            raise ValueError(
                f"recipe key conditioning.clip_from is {own.clip_from!r}, but conditioning.encoders is 't5': add clip "
                "or clip_image, such as t5+clip"
            )
        return
    if "t5" not in recipe.encoders and recipe.text_length != Recipe.text_length:
        raise ValueError(
            f"recipe key text_length is {recipe.text_length}, but conditioning.encoders {own.encoders!r} has no t5, "
            "whose tokens it counts: add t5, or leave the length out"
        )
    if not own.clip_from and not recipe.text_encoder_from:
        raise ValueError(
            f"recipe key conditioning.clip_from is empty, with conditioning.encoders {own.encoders!r}: name "
            "transformers' folder of a CLIPModel"
        )
    if recipe.keeps_base:
        beside = (
            f"lora.rank {recipe.lora.rank}" if recipe.lora.rank else f"new_words.tokens {recipe.new_words.tokens!r}"
        )
        raise ValueError(
            f"recipe key conditioning.encoders is {own.encoders!r} with {beside}: beside frozen weights T5 alone is "
            "read"
        )


def _check_beside(recipe: Recipe) -> None:
    """What is trained beside frozen weights needs those."""
    if not recipe.keeps_base:
        return
    rank, words = recipe.lora.rank, recipe.new_words.tokens
    beside, kind = (f"lora.rank {rank}", "a LoRA keeps") if rank else (f"new_words.tokens {words!r}", "new words keep")
    if not recipe.init_from:
        raise ValueError(f"recipe key init_from is empty, with {beside}: name the stage folder to fine-tune")
    if recipe.init_only:
        raise ValueError(f"recipe key init_only is {recipe.init_only!r}: {kind} all weights of init_from")
    if not recipe.text_encoder_from:
        raise ValueError(
            f"recipe key text_encoder_from is empty, with {beside}: name the release whose encoder the "
            f"stage reads, such as {recipe.init_from}"
        )


def _check_new_words(recipe: Recipe) -> None:
    words = recipe.new_words
    if not words.tokens:
        if words.init:
            raise ValueError(
                f"recipe key new_words.init is {words.init!r} without new_words.tokens: name the words too"
            )
        return
    if recipe.lora.rank:
        raise ValueError(f"recipe key lora.rank is {recipe.lora.rank} with new_words.tokens: train one after the other")
    if recipe.stage != "base":
        raise ValueError("recipe key new_words.tokens: a super-resolution stage brings no text encoder to add words to")
    if recipe.data.embeddings:
        raise ValueError(
            f"recipe key data.embeddings is {recipe.data.embeddings!r} with new_words.tokens: what the text encoder "
            "says of a new word changes every step; leave one of them out"
        )
    for word in words.tokens:
        cleaned = prepare_captions([f"a {word} here"], True, recipe.data.preparation.preserve_case)[0]
        if not word or cleaned != f"a {word} here":
            raise ValueError(
                f"recipe key new_words.tokens holds {word!r}, which the cleaning of captions makes {cleaned[2:-5]!r}: "
                "use letters, digits and single hyphens, such as sks-toy"
            )


def _check_lora(recipe: Recipe) -> None:
    lora = recipe.lora
    if not lora.rank:
        _refuse_changed("lora", lora, "without lora.rank: set a rank of 1 or more, such as 16")
        return
    if lora.text_encoder and recipe.stage != "base":
        raise ValueError("recipe key lora.text_encoder is True, but a super-resolution stage brings no text encoder")
    if lora.text_encoder and recipe.data.embeddings:
        raise ValueError(
            f"recipe key data.embeddings is {recipe.data.embeddings!r} with lora.text_encoder: what the text encoder "
            "says changes every step; leave one of them out"
        )
    kernels = kernels_of(abstract_params(presets.UNETS[recipe.unet]))
    try:
        paths = target_paths(kernels, lora.targets)
    except ValueError as error:
        raise ValueError(f"recipe key lora.targets is {lora.targets!r}: {error}") from None
    try:
        check_rank(kernels, paths, lora.rank)
    except ValueError as error:
        raise ValueError(f"recipe key lora.rank is {lora.rank}: {error}") from None


def _refuse_changed(name: str, section: LoraConfig | DistillConfig, why: str) -> None:
    """Refuses a section that is switched off, where any of its keys is not at its default."""
    for key, value in dataclasses.asdict(type(section)()).items():
        if getattr(section, key) != value:
            raise ValueError(f"recipe key {name}.{key} is {getattr(section, key)!r} {why}")


def _check_distill(recipe: Recipe) -> None:
    own = recipe.distill
    if not own.method:
        _refuse_changed("distill", own, "without distill.method: set progressive or consistency")
        return
    named = f"with distill.method {own.method!r}"
    if not own.teacher:
        raise ValueError(f"recipe key distill.teacher is empty, {named}: name the stage folder of its release")
    try:
        own.timesteps  # noqa: B018 (it checks that they divide)
    except ValueError as error:
        raise ValueError(
            f"recipe key distill.steps is {own.steps} and distill.substeps {own.substeps}: {error} steps; use such as "
            "4 and 2"
        ) from None
    if recipe.prediction == "eps":
        raise ValueError(
            f"recipe key prediction is 'eps', {named}: where x_t is almost noise that says nothing of the picture, "
            "which a student must draw from it; train the teacher on with prediction=v and init_only=. first"
        )
    if not recipe.text_encoder_from:
        raise ValueError(
            f"recipe key text_encoder_from is empty, {named}: name the release whose encoder the teacher reads, such "
            f"as {own.teacher}"
        )
    beside = {
        "lora.rank": recipe.lora.rank,
        "new_words.tokens": recipe.new_words.tokens,
        "init_copy": recipe.init_copy,
        "pooled_dropout": recipe.pooled_dropout,
        "bound_weight": recipe.bound_weight,
        "loss_weight": "" if recipe.loss_weight == "none" else recipe.loss_weight,
        "conditioning.encoders": "" if recipe.encoders == ("t5",) else recipe.conditioning.encoders,
        "validation.every": recipe.validation.every,
    }
    for key, value in beside.items():
        if value:
            rest = {"loss_weight": "none", "conditioning.encoders": "t5", "new_words.tokens": "()"}.get(key, "0")
            raise ValueError(
                f"recipe key {key} is {value!r}, {named}: a student is trained on what its teacher says alone; set "
                f"{key}={rest}"
            )


def _check_sides(recipe: Recipe) -> None:
    data, halvings = recipe.data, len(presets.UNETS[recipe.unet].block_out_channels) - 1
    if data.crop > data.size:
        raise ValueError(f"recipe key data.crop is {data.crop}: it must be at most data.size {data.size}")
    for key, side in (("crop", data.crop), ("size", data.size)):  # trained on crops, it draws whole pictures
        if side % 2**halvings:
            raise ValueError(
                f"recipe key data.{key} is {side}: pictures of side {side} cannot be halved {halvings} times: "
                f"use a multiple of {2**halvings}"
            )
    if recipe.stage != "super-resolution":
        return
    if data.size % data.low_size:
        raise ValueError(
            f"recipe key data.size is {data.size}: it must be a multiple of data.low_size {data.low_size}, "
            f"such as {data.low_size * max(1, round(data.size / data.low_size))}"
        )
    if data.crop % (data.size // data.low_size):
        raise ValueError(
            f"recipe key data.crop is {data.crop}: it must be a multiple of {data.size // data.low_size}, which is "
            "data.size over data.low_size"
        )
    if recipe.sample.every and recipe.sample.aug_level > data.max_aug_level:
        raise ValueError(
            f"recipe key sample.aug_level is {recipe.sample.aug_level}: more noise than data.max_aug_level "
            f"{data.max_aug_level} that the stage is trained with"
        )


def _check_data(recipe: Recipe) -> None:
    data = recipe.data
    if data.embeddings and recipe.trains_text:
        raise ValueError(
            f"recipe key data.embeddings is {data.embeddings!r} without text_encoder_from: an encoder that is trained "
            "makes other states every step; name the frozen one"
        )
    if not 0.0 <= data.preparation.shift <= 1.0:
        raise ValueError(f"recipe key data.preparation.shift is {data.preparation.shift}: it must be from 0 to 1")
    if outside := [(key, value) for key, value in dataclasses.asdict(data.keep).items() if value < 0]:
        key, value = outside[0]
        raise ValueError(f"recipe key data.keep.{key} is negative, {value}: 0 lets all pass")
    try:
        parse_bytes(data.remote.cache_size)
    except ValueError as error:
        raise ValueError(f"recipe key data.remote.cache_size is {data.remote.cache_size!r}: {error}") from None
    if not data.source.strip():
        raise ValueError("recipe key data.source is empty: name a source, such as scenes or a folder of pictures")


def _check_validation(validation: ValidationConfig) -> None:
    if validation.every and not validation.timesteps:
        raise ValueError(
            "recipe key validation.timesteps is empty: give some of 0 to 999, or set validation.every=0 to measure none"
        )
