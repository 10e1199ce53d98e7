"""The pictures a run draws of itself: fixed prompts, fixed noise, EMA weights, by the very code that inference uses."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from PIL import Image

from if_jax.checkpoints.weights import Params
from if_jax.config import Recipe
from if_jax.data import pipeline
from if_jax.data.index import Filter
from if_jax.diffusion import augment
from if_jax.inference.denoise_stage import begin_stage, finish_stage
from if_jax.inference.pictures import grid, to_pil
from if_jax.inference.settings import stage_settings
from if_jax.inference.stage_inputs import StageInputs
from if_jax.models import lora
from if_jax.text.captions import prepare_captions
from if_jax.text.clip_tokens import CaptionReader
from if_jax.training.objective import Networks
from if_jax.training.randomness import stream
from if_jax.training.stage import make_stage, stage_defaults

Sheet = tuple[Image.Image, dict[str, Image.Image]]  # all pictures in a grid, and each by its prompt


def make_sampler(recipe: Recipe, networks: Networks, read: CaptionReader, frozen: Params) -> Callable[[Params], Sheet]:
    """Makes the function that draws a run's sheet of pictures.

    Base stages draw the recipe's prompts, later ones enlarge as many pictures of `validation.source`; the grid of those
    has three columns: bilinear enlargement, the stage's picture, the truth.

    Args:
      recipe: what is trained.
      networks: its modules.
      read: turns captions into what the encoders take.
      frozen: parameters by network that are not trained.

    Returns:
      `sheet(params) -> (grid, pictures by prompt)`, with params {"unet", "text_encoder" where it is trained}.
    """
    encode = jax.jit(networks.encode)

    def draw(params: Params, captions: list[str], low_res: jax.Array | None) -> np.ndarray:
        whole = networks.joined(frozen, params)
        stage = make_stage(recipe, lora.merge(whole["unet"], recipe.compute_dtype), networks.clip)
        settings = stage_settings("sample", stage, stage_defaults(recipe), None)
        encoders = {name: own for name, own in whole.items() if name != "unet"}
        states = encode(encoders, dict(zip(read.names, read([*captions, ""]), strict=True)))
        all_keys = jax.random.split(stream(jax.random.key(recipe.seed), "sample sheets"), len(captions))

        def part(rows: np.ndarray) -> np.ndarray:
            empty = jnp.broadcast_to(states[-1:], (len(rows), *states.shape[1:]))
            inputs = StageInputs(states[rows], empty, None if low_res is None else low_res[rows])
            return np.asarray(finish_stage(*begin_stage(stage, settings, all_keys[rows], inputs)))

        return _in_parts_that_fit(part, len(captions))

    prompts = list(recipe.sample.prompts)

    def sheet(params: Params) -> Sheet:
        captions = prepare_captions(prompts, preserve_case=recipe.data.preparation.preserve_case)
        drawn = [to_pil(image) for image in draw(params, captions, None)]
        return grid(drawn), dict(zip(prompts, drawn, strict=True))

    if recipe.stage == "base":
        return sheet

    @functools.cache
    def held_out() -> tuple[list[str], np.ndarray]:
        v, side = recipe.validation, recipe.data.size
        preparation = dataclasses.replace(recipe.data.preparation, shift=0.0)
        settings = (preparation, Filter(), recipe.data.remote, recipe.data.exclude)
        samples = pipeline.open_source(v.source, side, v.seed, *settings).read(range(len(prompts)))
        return [s.caption for s in samples], np.stack([s.image for s in samples]).astype(np.float32) / 127.5 - 1.0

    def enlarged(params: Params) -> Sheet:
        captions, truth = held_out()
        low_res = augment.downsample(jnp.asarray(truth), recipe.data.low_size)
        bilinear = np.asarray(augment.upsample(low_res, recipe.data.size))
        own = draw(params, captions, low_res)
        rows = zip(bilinear, own, truth, strict=True)
        single = {caption: to_pil(image) for caption, image in zip(captions, own, strict=True)}
        return grid([to_pil(image) for row in rows for image in row], columns=3), single

    if recipe.sample.every:
        held_out()  # a source that cannot be read fails now, not at the first sheet
    return enlarged


def _in_parts_that_fit(draw: Callable[[np.ndarray], np.ndarray], count: int) -> np.ndarray:
    """Pictures of the rows 0 … count − 1: all at once, or half as many at a time where memory runs out, and so on.

    Args:
      draw: rows (R,) -> pictures (R, H, W, 3); R stays the same, so that one program draws all.
      count: of pictures.
    """
    size = count
    while True:
        try:
            parts = [draw(np.minimum(np.arange(first, first + size), count - 1)) for first in range(0, count, size)]
            return np.concatenate(parts)[:count]  # the last one may be filled up
        except jax.errors.JaxRuntimeError as error:
            if size == 1 or "RESOURCE_EXHAUSTED" not in str(error):
                raise
            size = -(-size // 2)
            logging.warning("the sample sheet does not fit into memory: drawing %d pictures at a time", size)
