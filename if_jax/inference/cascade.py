"""A finished cascade: text goes in, every stage draws, the later ones enlarging what the one before has drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from if_jax.checkpoints.release import IF_DEFAULTS, STAGE_NAMES, Stage, StageDefaults, check_stages, read_cascade
from if_jax.checkpoints.weights import load_params
from if_jax.inference.drawing import StageNoise, StageSettings, draw_stage, stage_settings
from if_jax.inference.pictures import to_pil
from if_jax.models.t5 import T5Config, T5Encoder
from if_jax.text.encode import encode

DEMO = Path(__file__).parent.parent / "demo"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Cascade:
    """Stages in order, the first with the text encoder that all of them read; made by `Cascade.load`."""

    stages: tuple[Stage, ...]
    defaults: tuple[StageDefaults, ...]
    dtype: Any = jnp.float32  # of matrix products and convolutions

    @classmethod
    def load(cls, folder: str | Path = "demo", *, stages: int | None = None, dtype: Any = jnp.float32) -> Cascade:
        """Open a release: "demo" (ships with the package), a cascade folder or a base stage folder.

        stages: read only so many. dtype: what to compute in; parameters stay float32.
        Raises FileNotFoundError naming what is missing, ValueError where parts do not belong together.
        """
        if str(folder) == "demo":
            folder = DEMO
        if stages is not None and stages < 1:
            raise ValueError(f"stages is {stages}: use 1 or more")
        found, defaults = read_cascade(folder, None, stages)
        if stages is not None and stages > len(found):
            raise ValueError(f"stages is {stages}, but {folder} has {len(found)}: use {len(found)} or fewer")
        return cls.of(found, defaults, dtype)

    @classmethod
    def of(cls, stages: Sequence[Stage], defaults: Sequence[StageDefaults] = (), dtype: Any = jnp.float32) -> Cascade:
        """A cascade of stages that are open already; without defaults they draw as IF's own code calls them."""
        defaults = tuple(defaults) or IF_DEFAULTS[: len(stages)]
        check_stages(stages, defaults)
        return cls(tuple(_on_device(stage) for stage in stages), defaults, dtype)

    def dream(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        seed: int = 0,
        negative_prompt: str | Sequence[str] | None = None,
        if_I_kwargs: Mapping[str, Any] | None = None,
        if_II_kwargs: Mapping[str, Any] | None = None,
        if_III_kwargs: Mapping[str, Any] | None = None,
        stages: int | None = None,
        prompt_embeds: np.ndarray | None = None,
        negative_prompt_embeds: np.ndarray | None = None,
        clean_caption: bool = True,
        batch_size: int = 4,
        return_tensors: bool = False,
        noise: Mapping[str, StageNoise] | None = None,
        progress: Progress | None = None,
    ) -> dict[str, list]:
        """Draw one picture for each prompt: {"I": [PIL, …], "II": [PIL, …], …}.

        Picture k of a seed is the same whatever stands beside it and however many are drawn at a time.
        negative_prompt: what to draw away from, in stage I (as IF has it), where guidance_scale is not 1.
        if_I_kwargs, …: see `drawing.stage_settings`. stages: draw only so many.
        prompt_embeds, negative_prompt_embeds (B, 77, D): text states (of `embed`) in place of the texts.
        clean_caption: clean prompts by IF's rules first. batch_size: at most so many pictures in one program.
        return_tensors: NumPy arrays (H, W, 3), float32 in about [-1, 1], unclamped, in place of pictures.
        noise: by stage name, in place of drawn noise. progress(stage, pictures done, of how many).
        Raises ValueError where an argument cannot work.
        """
        if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
            raise ValueError(f"seed is {seed!r}: use a whole number in 0…{2**32 - 1}")
        settings = self._settings(stages, (if_I_kwargs, if_II_kwargs, if_III_kwargs))
        text, empty, negative = self._conditioning(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, clean_caption
        )
        drawn: dict[str, list] = {}
        low_res = None
        for index, (name, stage, how) in enumerate(zip(STAGE_NAMES, self.stages, settings, strict=False)):
            uncond = empty if index else negative
            inputs = {"text": text, "uncond": uncond, "low_res": low_res, "noise": (noise or {}).get(name)}
            keys_of = partial(_picture_keys, np.uint32(seed), np.uint32(index))
            low_res = self._draw(name, stage, how, keys_of, inputs, batch_size, progress)
            drawn[name] = list(low_res) if return_tensors else [to_pil(image) for image in low_res]
        return drawn

    def embed(self, captions: Sequence[str], clean_caption: bool = True) -> np.ndarray:
        """Text states (B, 77, D) of captions, float32: what `prompt_embeds` takes."""
        base = self.stages[0]
        apply = partial(_encode_text, config=base.text_config, dtype=jnp.dtype(self.dtype))
        # Two rows, prompt and empty caption, are the commonest case; equal captions are encoded once.
        states = encode(apply, base.text_params, base.tokenizer, captions, clean=clean_caption, batch_size=2)
        return np.asarray(states)

    def _settings(self, stages: int | None, given: Sequence[Mapping[str, Any] | None]) -> list[StageSettings]:
        """How each of the first `stages` stages is to draw."""
        count = len(self.stages) if stages is None else stages
        if not 1 <= count <= len(self.stages):
            raise ValueError(f"stages is {stages}: this cascade has {len(self.stages)}, use 1…{len(self.stages)}")
        for name, words in zip(STAGE_NAMES[len(self.stages) :], given[len(self.stages) :], strict=False):
            if words:
                raise ValueError(f"if_{name}_kwargs is given, but this cascade has {len(self.stages)} stage(s)")
        rows = zip(STAGE_NAMES, self.stages[:count], self.defaults, (*given, *[None] * count), strict=False)
        return [stage_settings(name, stage, defaults, words) for name, stage, defaults, words in rows]

    def _conditioning(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None,
        prompt_embeds: np.ndarray | None,
        negative_prompt_embeds: np.ndarray | None,
        clean: bool,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Text states (B, 77, D) of the prompts, of the empty caption and of what guidance draws away from."""
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give either prompt or prompt_embeds, not both and not neither")
        prompts = None if prompt is None else _captions("prompt", prompt)
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("give either negative_prompt or negative_prompt_embeds, not both")
        negatives = _captions("negative_prompt", "" if negative_prompt is None else negative_prompt)
        states = self.embed([*(prompts or []), "", *negatives], clean)
        text, empty, negative = np.split(states, [len(prompts or []), len(prompts or []) + 1])
        if prompt_embeds is not None:
            text = _embeds("prompt_embeds", prompt_embeds, states.shape[1:])
        if negative_prompt_embeds is not None:
            negative = _embeds("negative_prompt_embeds", negative_prompt_embeds, states.shape[1:])
        if len(negative) not in (1, len(text)):
            raise ValueError(f"{len(negative)} negative prompts for {len(text)} prompts: give one, or one for each")
        return text, np.broadcast_to(empty, text.shape), np.broadcast_to(negative, text.shape)

    def _draw(
        self,
        name: str,
        stage: Stage,
        settings: StageSettings,
        keys_of: Callable[[np.ndarray], jax.Array],
        inputs: Mapping[str, Any],
        batch_size: int,
        progress: Progress | None,
    ) -> np.ndarray:
        """All pictures of one stage (B, H, W, 3), in programs of equal batch size."""
        total, drawn = len(inputs["text"]), []
        for rows in _chunks(total, batch_size):
            if progress is not None:
                progress(name, sum(map(len, drawn)), total)
            part = {word: None if value is None else value[rows] for word, value in inputs.items()}
            images = draw_stage(stage, settings, keys_of(rows), **part, dtype=self.dtype)
            drawn.append(np.asarray(images)[: total - sum(map(len, drawn))])
        if progress is not None:
            progress(name, total, total)
        return np.concatenate(drawn)


@partial(jax.jit, static_argnames=("config", "dtype"))
def _encode_text(params: Any, ids: jax.Array, mask: jax.Array, *, config: T5Config, dtype: Any) -> jax.Array:
    return T5Encoder(config, dtype=dtype).apply({"params": params}, ids, mask)


@jax.jit
def _picture_keys(seed: jax.Array, stage: jax.Array, rows: jax.Array) -> jax.Array:
    """One key for each picture (B,), from the seed, the stage and the picture's number alone."""
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), stage))(rows)


def _on_device(stage: Stage) -> Stage:
    """Parameters go straight from the file to the device, tensor by tensor, as float32."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def load(lazy: Any) -> Any:
        return load_params(lazy, "float32", jax.tree.map(lambda _: place, lazy))

    return replace(stage, unet_params=load(stage.unet_params), text_params=load(stage.text_params))


def _chunks(total: int, batch_size: int) -> Iterator[np.ndarray]:
    """Rows of each program: as few programs as `batch_size` allows, all of one size, so that one compilation does.

    The last one repeats the last row where the rows do not divide evenly.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: use 1 or more")
    size = math.ceil(total / math.ceil(total / batch_size))
    for start in range(0, total, size):
        yield np.minimum(np.arange(start, start + size), total - 1)


def _captions(word: str, given: str | Sequence[str]) -> list[str]:
    captions = [given] if isinstance(given, str) else list(given)
    if not captions:
        raise ValueError(f"{word} is empty: give at least one text")
    for caption in captions:
        if not isinstance(caption, str):
            raise ValueError(f"{word} holds {caption!r} ({type(caption).__name__}): give texts")
    return captions


def _embeds(word: str, given: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    states = np.asarray(given, np.float32)
    if states.shape[1:] != shape or not len(states):
        raise ValueError(f"{word} has shape {states.shape}: expected (B, {shape[0]}, {shape[1]})")
    return states
