"""A finished cascade: text goes in, every stage draws, the later ones enlarging what the one before has drawn.

IF's four modes. Where IF's own code and diffusers differ:

* The noise on the low-resolution picture is drawn once, as in diffusers; IF draws it anew at every step.
* `negative_prompt` of `dream` is for stage I alone, as in IF; the other modes pass it to every stage, as in both.
* A style transfer draws its noise for each picture; IF repeats one. Its `strength` is that of diffusers.
* `style_prompt` is IF's: pooled in place of the prompt, and a branch of its own in guidance (`positive_mixer`).
* In an inpainting the kept part is the clean picture at every step, as in both.
* Other than square, later stages keep the exact proportions of the first; diffusers rounds anew at every size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from if_jax.checkpoints.release import read_cascade
from if_jax.checkpoints.stages import IF_DEFAULTS, STAGE_NAMES, StageDefaults, StageRelease, check_stages
from if_jax.inference import inputs, loading
from if_jax.inference.batching import StageRequest, draw_pictures
from if_jax.inference.loading import Placement
from if_jax.inference.options import Options, checked_batch_size, checked_numbers
from if_jax.inference.pictures import Drawn, to_pil
from if_jax.inference.prompts import Conditioning, Texts, condition
from if_jax.inference.research import OpenStage
from if_jax.inference.settings import SUPPORT_WORDS, StageSettings, stage_settings
from if_jax.models.t5 import T5Config, T5Encoder
from if_jax.text.encode import encode
from if_jax.text.tokens import TEXT_LENGTH

DEMO = Path(__file__).parent.parent / "demo"


@dataclass(frozen=True)
class _Plan:
    """What distinguishes the modes: which stages draw, over what, at what size, with which strength."""

    sizes: tuple[tuple[int, int], ...]  # (H, W) of each stage that draws
    first: int = 0  # index of the first stage that draws
    low_res: np.ndarray | None = None  # (1 or B, h, w, 3), what the first stage is shown, where it enlarges
    supports: tuple[np.ndarray, ...] | None = None  # (1 or B, H, W, 3) of each stage, to draw over
    masks: tuple[np.ndarray, ...] | None = None
    strengths: tuple[float, float] = (1.0, 1.0)  # defaults of the first stage and of later ones
    negative_everywhere: bool = True
    noise_level: int | None = None  # another default of the later stages


@dataclass(frozen=True, eq=False)
class Cascade:
    """Stages in order, the first with the text encoder that all of them read; made by `Cascade.load`."""

    stages: tuple[StageRelease, ...]
    defaults: tuple[StageDefaults, ...]
    placement: Placement = field(default_factory=Placement)

    @classmethod
    def load(
        cls, folder: str | Path = "demo", *, stages: int | None = None, dtype: Any = jnp.float32, **placement: Any
    ) -> Cascade:
        """Open a release: "demo" (ships with the package), a cascade folder or a base stage folder.

        stages: read only so many. dtype: what to compute in. placement: `param_dtype`, `text_dtype` (also "int8"),
        `low_memory`, `mesh`, `rules`: see `loading.Placement`.
        Raises FileNotFoundError naming what is missing, ValueError where parts do not belong together.
        """
        if str(folder) == "demo":
            folder = DEMO
        if stages is not None and stages < 1:
            raise ValueError(f"stages is {stages}: use 1 or more")
        found, defaults = read_cascade(folder, None, stages)
        if stages is not None and stages > len(found):
            raise ValueError(f"stages is {stages}, but {folder} has {len(found)}: use {len(found)} or fewer")
        return cls.of(found, defaults, dtype, **placement)

    @classmethod
    def of(
        cls,
        stages: Sequence[StageRelease],
        defaults: Sequence[StageDefaults] = (),
        dtype: Any = jnp.float32,
        **placement: Any,
    ) -> Cascade:
        """A cascade of stages that are open already; without defaults they draw as IF's own code calls them."""
        defaults = tuple(defaults) or IF_DEFAULTS[: len(stages)]
        check_stages(stages, defaults)
        how = Placement(dtype, **placement)
        return cls(tuple(loading.place_stage(stage, how) for stage in stages), defaults, how)

    def dream(
        self, prompt: str | Sequence[str] | None = None, *, aspect_ratio: str = "1:1", **options: Unpack[Options]
    ) -> dict[str, list]:
        """Draw one picture for each prompt: {"I": [PIL, …], "II": [PIL, …], …}.

        aspect_ratio: width:height, the short side being the stage's own size.
        Raises ValueError where an argument cannot work, MemoryError where a stage does not fit.
        """
        base = self.stages[0].unet_config
        size = inputs.size_of(inputs.parse_aspect_ratio(aspect_ratio), base.sample_size, base.size_multiple)
        plan = _Plan(self._sizes(0, size, options.get("stages")), negative_everywhere=False)
        return self._draw_all(plan, prompt, **options)

    def style_transfer(
        self,
        support_pil_img: Any = None,
        prompt: str | Sequence[str] | None = None,
        *,
        image: Any = None,
        **options: Unpack[Options],
    ) -> dict[str, list]:
        """Draw a picture anew after its prompt: noised to `strength` (0.7 in stage I, 0.8 later) and denoised.

        support_pil_img (diffusers: image): PIL, file, or floats (H, W, 3) in [-1, 1], of any size; or one for each
        prompt. style_prompt: IF's third branch of guidance; alone, it is the prompt as well.
        """
        if prompt is None and options.get("prompt_embeds") is None:
            prompt = options.get("style_prompt")
        pictures = self._pictures("support_pil_img", support_pil_img, "image", image)
        sizes = self._sizes(0, self._size_like(pictures[0], 0), options.get("stages"))
        plan = _Plan(sizes, supports=_fitted(pictures, sizes), strengths=(0.7, 0.8))
        return self._draw_all(plan, prompt, **options)

    def super_resolution(
        self,
        support_pil_img: Any = None,
        prompt: str | Sequence[str] | None = None,
        *,
        image: Any = None,
        stage: str = "II",
        **options: Unpack[Options],
    ) -> dict[str, list]:
        """Enlarge pictures, of any size: each is fitted to what `stage` enlarges, and the stages after it follow.

        support_pil_img (diffusers: image): as in `style_transfer`. prompt: what it shows; without, the empty caption.
        stages: the last stage to draw, counted from stage I.
        """
        if stage not in STAGE_NAMES[1 : len(self.stages)]:
            own = ", ".join(STAGE_NAMES[1 : len(self.stages)]) or "none"
            raise ValueError(f"stage is {stage!r}: the super-resolution stages of this cascade are {own}")
        first = STAGE_NAMES.index(stage)
        pictures = self._pictures("support_pil_img", support_pil_img, "image", image)
        low = self._size_like(pictures[0], first - 1)
        scale = self._scale(first)
        sizes = self._sizes(first, (low[0] * scale, low[1] * scale), options.get("stages"))
        low_res = np.stack([inputs.fit_picture(picture, low) for picture in pictures])
        if prompt is None and options.get("prompt_embeds") is None:
            prompt = [""] * len(pictures)
        return self._draw_all(_Plan(sizes, first, low_res), prompt, **options)

    def inpainting(
        self,
        support_pil_img: Any = None,
        inpainting_mask: Any = None,
        prompt: str | Sequence[str] | None = None,
        *,
        image: Any = None,
        mask_image: Any = None,
        **options: Unpack[Options],
    ) -> dict[str, list]:
        """Draw the masked part of a picture anew and keep the rest.

        support_pil_img (diffusers: image): as in `style_transfer`. inpainting_mask (mask_image): of the same size,
        white or 1 where to draw; one for each picture. `strength` is 1 in stage I and 0.8 later, where the noise on the
        low-resolution picture is least (level 0), as in diffusers.
        """
        given = self._pictures("support_pil_img", support_pil_img, "image", image)
        masks = inputs.as_list(_either("inpainting_mask", inpainting_mask, "mask_image", mask_image))
        if len(masks) != len(given):
            raise ValueError(f"{len(masks)} masks for {len(given)} pictures: give one for each")
        masks = [inputs.read_mask(m, inputs.picture_size(p), "mask") for m, p in zip(masks, given, strict=True)]
        sizes = self._sizes(0, self._size_like(given[0], 0), options.get("stages"))
        fitted = tuple(np.stack([inputs.fit_mask(mask, size) for mask in masks]) for size in sizes)
        plan = _Plan(sizes, supports=_fitted(given, sizes), masks=fitted, strengths=(1.0, 0.8), noise_level=0)
        return self._draw_all(plan, prompt, **options)

    def embed(self, captions: Sequence[str], clean_caption: bool = True) -> np.ndarray:
        """Text states (B, 77, D) of captions, float32: what `prompt_embeds` takes.

        They are lower-cased, as IF's are, unless the cascade was trained on captions whose case was preserved.
        """
        base, case = self.stages[0], self.defaults[0].preserve_case
        apply = partial(_encode_text, config=base.text_config, dtype=jnp.dtype(self.placement.dtype))
        params = loading.place_text(base, self.placement) if self.placement.low_memory else base.text_params
        # Two rows, prompt and empty caption, are the commonest case; equal captions are encoded once.
        how = {"clean": clean_caption, "preserve_case": case, "batch_size": 2}
        return np.asarray(encode(apply, params, base.tokenizer, captions, **how))

    def stage(self, name: str = "I") -> OpenStage:
        """One stage for research: its network, its denoiser, gradients through it."""
        if name not in STAGE_NAMES[: len(self.stages)]:
            raise ValueError(f"stage is {name!r}: this cascade has {', '.join(STAGE_NAMES[: len(self.stages)])}")
        return OpenStage(self._ready(STAGE_NAMES.index(name)), self.placement.dtype)

    def _ready(self, index: int) -> StageRelease:
        """A stage with its UNet on the device: in low memory read now, and dropped with the caller's reference."""
        stage = self.stages[index]
        if not self.placement.low_memory:
            return stage
        return replace(stage, unet_params=loading.place_unet(stage, self.placement))

    def _scale(self, index: int) -> int:
        """By how much a super-resolution stage enlarges."""
        return self.stages[index].unet_config.sample_size // self.stages[index - 1].unet_config.sample_size

    def _sizes(self, first: int, size: tuple[int, int], stages: int | None) -> tuple[tuple[int, int], ...]:
        """(H, W) of each stage that draws, from the first one's on."""
        last = len(self.stages) if stages is None else stages
        if not first < last <= len(self.stages):
            have = f"this cascade has {len(self.stages)}"
            raise ValueError(f"stages is {stages}: {have}, use {first + 1}…{len(self.stages)}")
        sizes = [size]
        for index in range(first + 1, last):
            scale = self._scale(index)
            sizes.append((sizes[-1][0] * scale, sizes[-1][1] * scale))
        return tuple(sizes)

    def _size_like(self, picture: Any, index: int) -> tuple[int, int]:
        """(H, W) at which a stage draws a picture of such proportions."""
        width, height = inputs.picture_size(picture)
        config = self.stages[index].unet_config
        return inputs.size_of(width / height, config.sample_size, config.size_multiple)

    def _pictures(self, word: str, given: Any, alias: str, other: Any) -> list[Any]:
        pictures = [inputs.read_picture(p, word) for p in inputs.as_list(_either(word, given, alias, other))]
        if not pictures or len({self._size_like(picture, 0) for picture in pictures}) > 1:
            raise ValueError(f"{word}: {len(pictures)} pictures of different proportions: draw them one after another")
        return pictures

    def _settings(self, plan: _Plan, options: Mapping[str, Any]) -> list[StageSettings]:
        """How each stage that draws is to do it."""
        words = {name: options.get(f"if_{name}_kwargs") for name in STAGE_NAMES}
        drawing = STAGE_NAMES[plan.first : plan.first + len(plan.sizes)]
        for name, given in words.items():
            if given and name not in STAGE_NAMES[: len(self.stages)]:
                raise ValueError(f"if_{name}_kwargs is given, but this cascade has {len(self.stages)} stage(s)")
            if plan.supports is None and (word := next((w for w in SUPPORT_WORDS if w in (given or {})), None)):
                raise ValueError(f"if_{name}_kwargs: {word} is for pictures that are drawn over; leave it out")
        settings = []
        for index, name in enumerate(drawing, plan.first):
            defaults = self.defaults[index]
            if plan.noise_level is not None and defaults.noise_level is not None:
                defaults = replace(defaults, noise_level=plan.noise_level)
            strength = plan.strengths[index > 0]
            settings.append(stage_settings(name, self.stages[index], defaults, words[name], strength))
        return settings

    def _draw_all(self, plan: _Plan, prompt: str | Sequence[str] | None, **options: Unpack[Options]) -> dict[str, list]:
        """What the four modes share: check everything, encode the texts once, let one stage after the other draw."""
        if unknown := options.keys() - Options.__annotations__.keys():
            raise TypeError(f"unknown argument {sorted(unknown)[0]!r}: use {', '.join(Options.__annotations__)}")
        settings = self._settings(plan, options)
        numbers = checked_numbers(options)
        batch_size = checked_batch_size(options.get("batch_size")) * self.placement.ways
        text = self._conditioning(prompt, options)
        count = len(text.text)
        given = _spread(plan, count)
        drawn = Drawn()
        low_res = given.low_res
        for position, how in enumerate(settings):
            index = plan.first + position
            name = STAGE_NAMES[index]
            uncond = text.uncond if index == 0 or plan.negative_everywhere else text.empty
            arrays = {"text": text.text, "uncond": uncond, "style": text.style, "low_res": low_res}
            arrays["support"] = given.supports and given.supports[position]
            arrays["mask"] = given.masks and given.masks[position]
            arrays["noise"] = (options.get("noise") or {}).get(name)
            job = StageRequest(name, index, how, plan.sizes[position], numbers[0], numbers[1], batch_size)
            low_res = draw_pictures(
                self._ready(index), job, self.placement, arrays, options.get("progress"), options.get("callback")
            )
            tensors = options.get("return_tensors", False)
            drawn[name] = list(low_res) if tensors else [to_pil(image) for image in low_res]
        return drawn

    def _conditioning(self, prompt: str | Sequence[str] | None, options: Mapping[str, Any]) -> Conditioning:
        words = ("negative_prompt", "style_prompt", "prompt_embeds", "negative_prompt_embeds", "empty_embeds")
        texts = Texts(prompt, **{word: options.get(word) for word in words})
        embed = partial(self.embed, clean_caption=options.get("clean_caption", True))
        return condition(texts, embed, (TEXT_LENGTH, self.stages[0].text_config.d_model))


@partial(jax.jit, static_argnames=("config", "dtype"))
def _encode_text(params: Any, ids: jax.Array, mask: jax.Array, *, config: T5Config, dtype: Any) -> jax.Array:
    return T5Encoder(config, dtype=dtype).apply({"params": loading.dequantize(params, dtype)}, ids, mask)


def _fitted(pictures: Sequence[Any], sizes: Sequence[tuple[int, int]]) -> tuple[np.ndarray, ...]:
    """The pictures at each size: (B, H, W, 3) float32 in [-1, 1]."""
    return tuple(np.stack([inputs.fit_picture(picture, size) for picture in pictures]) for size in sizes)


def _spread(plan: _Plan, count: int) -> _Plan:
    """The pictures of a plan, one for all prompts or one for each, as `count` of them."""

    def spread(stack: np.ndarray) -> np.ndarray:
        return inputs.batch_of(list(stack), count, "support_pil_img")

    return replace(
        plan,
        low_res=None if plan.low_res is None else spread(plan.low_res),
        supports=plan.supports and tuple(map(spread, plan.supports)),
        masks=plan.masks and tuple(map(spread, plan.masks)),
    )


def _either(word: str, given: Any, alias: str, other: Any) -> Any:
    if (given is None) == (other is None):
        raise ValueError(f"give {word} (or {alias}, the same thing), once")
    return other if given is None else given
