"""A finished cascade: text goes in, every stage draws, the later ones enlarging what the one before has drawn.

IF's four modes. Where IF's own code and diffusers differ:

* The noise on the low-resolution picture is drawn once, as in diffusers; IF draws it anew at every step.
* `negative_prompt` of `dream` is for stage I alone, as in IF; the other modes pass it to every stage, as in both.
* A style transfer draws its noise for each picture; IF repeats one. Its `strength` is that of diffusers.
* `style_prompt` is IF's: pooled in place of the prompt, and a branch of its own in guidance (`positive_mixer`).
* In an inpainting the kept part is the clean picture at every step, as in both.
* Other than square, later stages keep the exact proportions of the first; diffusers rounds anew at every size.

A request takes four forms on its way:

1. the call: a mode's own arguments and `options.Options`, as the user wrote them;
2. `modes.ModePlan` and `prompts.TextStates`: what tells the modes apart, pictures fitted; and the texts, encoded;
3. `batching.StageRequest`, one for each stage: its settings, and the `stage_inputs.StageInputs` of all pictures;
4. the `StageInputs` of the pictures of one program, on its device: what the compiled program of `denoise_stage` takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypedDict, Unpack

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from if_jax.checkpoints.lora import with_loras
from if_jax.checkpoints.release import read_cascade
from if_jax.checkpoints.stages import IF_DEFAULTS, STAGE_NAMES, StageDefaults, StageRelease, check_stages
from if_jax.checkpoints.words import with_word_files
from if_jax.inference import encoding, inputs, loading, modes
from if_jax.inference.batching import StageRequest, draw_pictures
from if_jax.inference.inputs import Picture
from if_jax.inference.loading import Placement
from if_jax.inference.modes import PICTURE_WORD, ModePlan, UserPictures
from if_jax.inference.options import Options, checked_batch_size, checked_numbers
from if_jax.inference.pictures import Drawn, to_pil
from if_jax.inference.prompts import encode_texts
from if_jax.inference.research import OpenStage
from if_jax.inference.stage_inputs import StageInputs

DEMO = Path(__file__).parent.parent / "demo"


class PlacementOptions(TypedDict, total=False):
    """What `Cascade.load` passes on to `loading.Placement`, which says what each means."""

    param_dtype: str
    text_dtype: str
    low_memory: bool
    mesh: Mesh | None
    rules: str


@dataclass(frozen=True, eq=False)
class Cascade:
    """Stages in order, the first with the text encoder that all of them read; made by `Cascade.load`."""

    stages: tuple[StageRelease, ...]
    defaults: tuple[StageDefaults, ...]
    placement: Placement = field(default_factory=Placement)

    @classmethod
    def load(
        cls,
        folder: str | Path = "demo",
        *,
        stages: int | None = None,
        dtype: DTypeLike = jnp.float32,
        lora: Mapping[str | Path, float] | None = None,
        new_words: Sequence[str | Path] = (),
        **placement: Unpack[PlacementOptions],
    ) -> Cascade:
        """Open a release.

        Args:
          folder: "demo" (ships with the package), a cascade folder or a base stage folder.
          stages: read only so many.
          dtype: what to compute in.
          lora: LoRA files (of if_jax, diffusers, peft or kohya), each with its weight: {"style.safetensors": 0.8}. Each
            goes into the weights of the stage it fits.
          new_words: files of words that were trained (of if_jax, or of diffusers' textual inversion).
          **placement: `param_dtype`, `text_dtype` (also "int8"), `low_memory`, `mesh`, `rules`: see
            `loading.Placement`.

        Raises:
          FileNotFoundError: naming what is missing.
          ValueError: where parts do not belong together, a LoRA fits no stage, or the text encoder knows a new word.
        """
        if str(folder) == "demo":
            folder = DEMO
        if stages is not None and stages < 1:
            raise ValueError(f"stages is {stages}: use 1 or more")
        opened, defaults = read_cascade(folder, None, stages)
        if stages is not None and stages > len(opened):
            raise ValueError(f"stages is {stages}, but {folder} has {len(opened)}: use {len(opened)} or fewer")
        if new_words:
            opened = with_word_files(opened, new_words)
        if lora:
            opened = with_loras(opened, lora)
        return cls.of(opened, defaults, dtype, **placement)

    @classmethod
    def of(
        cls,
        stages: Sequence[StageRelease],
        defaults: Sequence[StageDefaults] = (),
        dtype: DTypeLike = jnp.float32,
        **placement: Unpack[PlacementOptions],
    ) -> Cascade:
        """Make a cascade of stages that are open already.

        Args:
          stages: in order, the first with the text encoder.
          defaults: how each draws unless asked otherwise; without, as IF's own code calls its stages.
          dtype: what to compute in.
          **placement: as in `load`.

        Raises:
          ValueError: where the stages do not belong together.
        """
        defaults = tuple(defaults) or IF_DEFAULTS[: len(stages)]
        check_stages(stages, defaults)
        where = Placement(dtype, **placement)
        return cls(tuple(loading.place_stage(stage, where) for stage in stages), defaults, where)

    def dream(
        self, prompt: str | Sequence[str] | None = None, *, aspect_ratio: str = "1:1", **options: Unpack[Options]
    ) -> Drawn:
        """Draw one picture for each prompt.

        Args:
          prompt: one text or several.
          aspect_ratio: width:height, the short side being the stage's own size.
          **options: what all modes take, see `options.Options`.

        Returns:
          {"I": [PIL, …], "II": [PIL, …], …}

        Raises:
          ValueError: where an argument cannot work.
          MemoryError: where a stage does not fit.
        """
        if prompt is None and options.get("prompt_embeds") is None and (varied := options.get("vary")) is not None:
            prompt = [""] * (len(varied) if isinstance(varied, list | tuple) else 1)
        plan = modes.plan_dream(self.stages, aspect_ratio, options.get("stages"))
        return self._draw_all(plan, prompt, options)

    def style_transfer(
        self,
        support_pil_img: UserPictures | None = None,
        prompt: str | Sequence[str] | None = None,
        *,
        image: UserPictures | None = None,
        **options: Unpack[Options],
    ) -> Drawn:
        """Draw a picture anew after its prompt: noised to `strength` (0.7 in stage I, 0.8 later) and denoised.

        Args:
          support_pil_img: PIL, file, or floats (H, W, 3) in [-1, 1], of any size; or one for each prompt.
          prompt: one text or several. Without, `style_prompt` is the prompt as well.
          image: diffusers' word for support_pil_img.
          **options: as in `dream`.
        """
        if prompt is None and options.get("prompt_embeds") is None:
            prompt = options.get("style_prompt")
        pictures = modes.either(PICTURE_WORD, support_pil_img, "image", image)
        plan = modes.plan_drawn_over(self.stages, pictures, None, options.get("stages"))
        return self._draw_all(plan, prompt, options)

    def super_resolution(
        self,
        support_pil_img: UserPictures | None = None,
        prompt: str | Sequence[str] | None = None,
        *,
        image: UserPictures | None = None,
        stage: str = "II",
        **options: Unpack[Options],
    ) -> Drawn:
        """Enlarge pictures, of any size: each is fitted to what `stage` enlarges, and the stages after it follow.

        Args:
          support_pil_img: as in `style_transfer`.
          prompt: what it shows; without, the empty caption.
          image: diffusers' word for support_pil_img.
          stage: the first to draw, "II" or later.
          **options: as in `dream`; `stages` is the last stage to draw, counted from stage I.
        """
        pictures = modes.either(PICTURE_WORD, support_pil_img, "image", image)
        plan = modes.plan_super_resolution(self.stages, pictures, stage, options.get("stages"))
        if prompt is None and options.get("prompt_embeds") is None and plan.low_res is not None:
            prompt = [""] * len(plan.low_res)
        return self._draw_all(plan, prompt, options)

    def inpainting(
        self,
        support_pil_img: UserPictures | None = None,
        inpainting_mask: UserPictures | None = None,
        prompt: str | Sequence[str] | None = None,
        *,
        image: UserPictures | None = None,
        mask_image: UserPictures | None = None,
        **options: Unpack[Options],
    ) -> Drawn:
        """Draw the masked part of a picture anew and keep the rest.

        `strength` is 1 in stage I and 0.8 later, where the noise on the low-resolution picture is least (level 0), as
        in diffusers.

        Args:
          support_pil_img: as in `style_transfer`.
          inpainting_mask: of the picture's size, white or 1 where to draw; one for each picture.
          prompt: one text or several.
          image: diffusers' word for support_pil_img.
          mask_image: diffusers' word for inpainting_mask.
          **options: as in `dream`.
        """
        pictures = modes.either(PICTURE_WORD, support_pil_img, "image", image)
        masks = modes.either("inpainting_mask", inpainting_mask, "mask_image", mask_image)
        plan = modes.plan_drawn_over(self.stages, pictures, masks, options.get("stages"))
        return self._draw_all(plan, prompt, options)

    def embed(self, captions: Sequence[str], clean_caption: bool = True) -> np.ndarray:
        """Text states of captions: what `prompt_embeds` takes.

        Args:
          captions: B of them, lower-cased as IF's are, unless the cascade was trained on captions whose case was
            preserved.
          clean_caption: clean them by IF's rules first.

        Returns:
          (B, L, D) float32, L being 77 unless the cascade was trained otherwise.
        """
        return encoding.encode_captions(self.stages[0], self.defaults[0], self.placement, captions, clean_caption)

    def embed_pictures(self, pictures: Picture | Sequence[Picture]) -> np.ndarray:
        """CLIP's vectors of pictures, (B, width) float32: what a stage varies that reads `clip_image`.

        Raises:
          ValueError: this cascade reads no pictures; or something is no picture.
        """
        return encoding.encode_pictures(self.stages[0], self.placement, pictures)

    def stage(self, name: str = "I") -> OpenStage:
        """One stage for research: its network, its denoiser, gradients through it.

        Raises:
          ValueError: where the cascade has no stage of that name.
        """
        if name not in STAGE_NAMES[: len(self.stages)]:
            raise ValueError(f"stage is {name!r}: this cascade has {', '.join(STAGE_NAMES[: len(self.stages)])}")
        return OpenStage(self._ready(STAGE_NAMES.index(name)), self.placement.dtype)

    def _ready(self, index: int) -> StageRelease:
        """A stage with its UNet on the device: in low memory read now, and dropped with the caller's reference."""
        stage = self.stages[index]
        if not self.placement.low_memory:
            return stage
        return replace(stage, unet_params=loading.place_unet(stage, self.placement))

    def _draw_all(self, plan: ModePlan, prompt: str | Sequence[str] | None, options: Options) -> Drawn:
        """What the four modes share: check everything, encode the texts once, let one stage after the other draw."""
        if unknown := options.keys() - Options.__annotations__.keys():
            raise TypeError(f"unknown argument {sorted(unknown)[0]!r}: use {', '.join(Options.__annotations__)}")
        settings = modes.stage_settings_of(plan, self.stages, self.defaults, options)
        batch_size = checked_batch_size(options.get("batch_size")) * self.placement.ways
        embed = partial(self.embed, clean_caption=options.get("clean_caption", True))
        config = self.stages[0].unet_config
        shape = config.states_length(self.defaults[0].text_length), config.states_width
        text = encode_texts(prompt, options, embed, shape)
        if (varied := options.get("vary")) is not None:
            vectors = inputs.batch_of(self.embed_pictures(varied), len(text.text), "vary")
            text = replace(text, text=encoding.with_vectors(self.stages[0], text.text, vectors))
        count = len(text.text)
        seeds, numbers = checked_numbers(options, count)
        drawn, low_res = Drawn(), _for_each(plan.low_res, count)
        progress, callback, tensors = options.get("progress"), options.get("callback"), options.get("return_tensors")
        for position, stage_settings in enumerate(settings):
            index = plan.first + position
            name = STAGE_NAMES[index]
            uncond = text.uncond if index == 0 or plan.negative_everywhere else text.empty
            support = _for_each(plan.supports[position] if plan.supports else None, count)
            mask = _for_each(plan.masks[position] if plan.masks else None, count)
            noise = (options.get("noise") or {}).get(name)
            stage_inputs = StageInputs(text.text, uncond, low_res, text.style, support, mask, noise)
            size = plan.sizes[position]
            request = StageRequest(
                name, index, stage_settings, stage_inputs, size, seeds, numbers, batch_size, progress, callback
            )
            low_res = draw_pictures(self._ready(index), request, self.placement)
            if (guard := options.get("guard")) is not None:
                low_res, drawn.guarded[name] = guard.hide(low_res)
            drawn[name] = list(low_res) if tensors else [to_pil(image) for image in low_res]
        return drawn


def _for_each(pictures: np.ndarray | None, count: int) -> np.ndarray | None:
    """UserPictures (1 or B, H, W, C) for `count` prompts; None stays."""
    return None if pictures is None else inputs.batch_of(pictures, count, PICTURE_WORD)
