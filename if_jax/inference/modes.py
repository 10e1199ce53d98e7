"""What tells the four modes apart: which stages draw, at what size, over which pictures, with which settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from if_jax.checkpoints.stages import STAGE_NAMES, StageDefaults, StageRelease
from if_jax.inference import inputs
from if_jax.inference.inputs import Picture, ReadPicture
from if_jax.inference.options import Options
from if_jax.inference.settings import SUPPORT_WORDS, StageKwargs, StageSettings, stage_settings

UserPictures = Picture | list[Picture] | tuple[Picture, ...]  # one for all prompts, or one for each
Size = tuple[int, int]  # (H, W)
PICTURE_WORD = "support_pil_img"  # IF's; diffusers calls it image


@dataclass(frozen=True)
class ModePlan:
    """One call of a mode, its pictures read and fitted to each stage that draws."""

    sizes: tuple[Size, ...]  # of each stage that draws
    first: int = 0  # index of the first stage that draws
    low_res: np.ndarray | None = None  # (1 or B, h, w, 3), what the first stage enlarges
    supports: tuple[np.ndarray, ...] | None = None  # (1 or B, H, W, 3) of each stage, to draw over
    masks: tuple[np.ndarray, ...] | None = None  # (1 or B, H, W, 1) of each stage
    strengths: tuple[float, float] = (1.0, 1.0)  # defaults of the first stage and of later ones
    negative_everywhere: bool = True  # negative prompts are for every stage, not for stage I alone
    noise_level: int | None = None  # another default of the later stages


def either(word: str, pictures: UserPictures | None, alias: str, aliased: UserPictures | None) -> list[Picture]:
    """What came under one of two words, as a list; ValueError where it came under none or under both."""
    if (pictures is None) == (aliased is None):
        raise ValueError(f"give {word} (or {alias}, the same thing), once")
    chosen = aliased if pictures is None else pictures
    return list(chosen) if isinstance(chosen, list | tuple) else [cast(Picture, chosen)]


def plan_dream(stages: Sequence[StageRelease], aspect_ratio: str, last: int | None) -> ModePlan:
    """Plan pictures drawn from noise alone.

    Args:
      stages: of the cascade.
      aspect_ratio: width:height.
      last: how many stages draw, counted from stage I; None: all.

    Raises:
      ValueError: where an argument cannot work; also the other plans.
    """
    config = stages[0].unet_config
    size = inputs.size_of(inputs.parse_aspect_ratio(aspect_ratio), config.sample_size, config.size_multiple)
    return ModePlan(_sizes(stages, 0, size, last), negative_everywhere=False)


def plan_drawn_over(
    stages: Sequence[StageRelease], pictures: list[Picture], masks: list[Picture] | None, last: int | None
) -> ModePlan:
    """Plan pictures drawn over others, a style transfer; or, with masks, only in a part of them, an inpainting.

    Args:
      stages: of the cascade.
      pictures: one, or one for each prompt, of one shape.
      masks: one for each picture.
      last: as in `plan_dream`.
    """
    supports = _read_pictures(stages, pictures)
    sizes = _sizes(stages, 0, _size_like(stages[0], supports[0]), last)
    fitted = tuple(np.stack([inputs.fit_picture(picture, size) for picture in supports]) for size in sizes)
    plan = ModePlan(sizes, supports=fitted, strengths=(0.7, 0.8))
    if masks is None:
        return plan
    if len(masks) != len(supports):
        raise ValueError(f"{len(masks)} masks for {len(supports)} pictures: give one for each")
    read = [inputs.read_mask(m, inputs.picture_size(p), "mask") for m, p in zip(masks, supports, strict=True)]
    cut = tuple(np.stack([inputs.fit_mask(mask, size) for mask in read]) for size in sizes)
    return replace(plan, masks=cut, strengths=(1.0, 0.8), noise_level=0)


def plan_super_resolution(
    stages: Sequence[StageRelease], pictures: list[Picture], stage: str, last: int | None
) -> ModePlan:
    """Plan pictures enlarged by `stage` and those after it; see `plan_drawn_over`."""
    if stage not in STAGE_NAMES[1 : len(stages)]:
        own = ", ".join(STAGE_NAMES[1 : len(stages)]) or "none"
        raise ValueError(f"stage is {stage!r}: the super-resolution stages of this cascade are {own}")
    first = STAGE_NAMES.index(stage)
    small = _read_pictures(stages, pictures)
    height, width = _size_like(stages[first - 1], small[0])
    scale = _scale(stages, first)
    sizes = _sizes(stages, first, (height * scale, width * scale), last)
    return ModePlan(sizes, first, np.stack([inputs.fit_picture(picture, (height, width)) for picture in small]))


def stage_settings_of(
    plan: ModePlan, stages: Sequence[StageRelease], defaults: Sequence[StageDefaults], options: Options
) -> list[StageSettings]:
    """How each stage that draws is to do it.

    Args:
      plan: of the mode.
      stages: of the cascade.
      defaults: of each stage.
      options: whose if_I_kwargs, … are read.

    Raises:
      ValueError: for words of a stage that is not there, of another mode, unknown or out of range.
    """
    words = {name: cast(StageKwargs | None, options.get(f"if_{name}_kwargs")) or {} for name in STAGE_NAMES}
    for name, kwargs in words.items():
        if kwargs and name not in STAGE_NAMES[: len(stages)]:
            raise ValueError(f"if_{name}_kwargs is given, but this cascade has {len(stages)} stage(s)")
        drawn = STAGE_NAMES[plan.first : plan.first + len(plan.sizes)]
        if kwargs and name not in drawn:
            raise ValueError(f"if_{name}_kwargs is given, but stage {name} is not drawn, only {', '.join(drawn)}")
        if "positive_mixer" in kwargs and not options.get("style_prompt"):
            raise ValueError(f"if_{name}_kwargs: positive_mixer is the share of the style: give style_prompt too")
        if plan.supports is None and (word := next((w for w in SUPPORT_WORDS if w in kwargs), None)):
            raise ValueError(f"if_{name}_kwargs: {word} is for pictures that are drawn over; leave it out")
    settings = []
    for index in range(plan.first, plan.first + len(plan.sizes)):
        name, default = STAGE_NAMES[index], defaults[index]
        if plan.noise_level is not None and default.noise_level is not None:
            default = replace(default, noise_level=plan.noise_level)
        settings.append(stage_settings(name, stages[index], default, words[name], plan.strengths[index > 0]))
    negative = options.get("negative_prompt") or options.get("negative_prompt_embeds") is not None
    if negative and not any(each.guided for each in (settings if plan.negative_everywhere else settings[:1])):
        raise ValueError("negative_prompt does nothing at guidance_scale 1: leave it out, or give another scale")
    return settings


def _scale(stages: Sequence[StageRelease], index: int) -> int:
    """By how much a super-resolution stage enlarges."""
    return stages[index].unet_config.sample_size // stages[index - 1].unet_config.sample_size


def _sizes(stages: Sequence[StageRelease], first: int, size: Size, last: int | None) -> tuple[Size, ...]:
    """The size of each stage that draws, from the first one's on."""
    end = len(stages) if last is None else last
    if not first < end <= len(stages):
        raise ValueError(f"stages is {last}: this cascade has {len(stages)}, use {first + 1}…{len(stages)}")
    sizes = [size]
    for index in range(first + 1, end):
        scale = _scale(stages, index)
        sizes.append((sizes[-1][0] * scale, sizes[-1][1] * scale))
    return tuple(sizes)


def _size_like(stage: StageRelease, picture: ReadPicture) -> Size:
    """The size at which a stage draws a picture of such proportions."""
    width, height = inputs.picture_size(picture)
    return inputs.size_of(width / height, stage.unet_config.sample_size, stage.unet_config.size_multiple)


def _read_pictures(stages: Sequence[StageRelease], pictures: list[Picture]) -> list[ReadPicture]:
    read = [inputs.read_picture(picture, PICTURE_WORD) for picture in pictures]
    if not read or len({_size_like(stages[0], picture) for picture in read}) > 1:
        raise ValueError(f"{PICTURE_WORD}: {len(read)} pictures of different proportions: draw them one after another")
    return read
