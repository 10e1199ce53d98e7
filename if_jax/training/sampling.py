"""The pictures a run draws of itself: fixed prompts, fixed noise, EMA weights, by the very code that inference uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from if_jax.config import Recipe
from if_jax.data import grammar, scenes
from if_jax.diffusion import augment
from if_jax.inference.drawing import draw_stage
from if_jax.inference.pictures import grid, to_pil
from if_jax.inference.settings import stage_settings
from if_jax.text.tokens import Tokenizer
from if_jax.training.objective import Networks
from if_jax.training.publish import make_stage, stage_defaults

HELD_OUT_SEED = 2**31 - 2  # scenes of this seed are for looking at; recipes have no reason to train on them


Sheet = tuple[Image.Image, dict[str, Image.Image]]  # all pictures in a grid, and each by its prompt


def make_sampler(recipe: Recipe, networks: Networks, tokenizer: Tokenizer, frozen: Any) -> Callable[[Any], Sheet]:
    """Returns `draw(params) -> sheet`: base stages draw the recipe's prompts, later ones enlarge held-out scenes.

    The grid of a super-resolution stage has three columns: bilinear enlargement, the stage's picture, the truth.
    """
    encode = jax.jit(lambda text, ids, mask: networks.text_encoder.apply({"params": text}, ids, mask))

    def draw(params: Any, captions: list[str], low_res: jax.Array | None) -> np.ndarray:
        stage = make_stage(recipe, params["unet"], size=recipe.data.size)
        settings = stage_settings("sample", stage, stage_defaults(recipe), None)
        states = encode(params.get("text_encoder", frozen.get("text_encoder")), *tokenizer([*captions, ""]))
        keys = jax.random.split(jax.random.key(recipe.seed), len(captions))
        empty = jnp.broadcast_to(states[-1:], states[:-1].shape)
        return np.asarray(draw_stage(stage, settings, keys, states[:-1], empty, low_res))

    def sheet(params: Any) -> Sheet:
        prompts = list(recipe.sample.prompts)
        drawn = [to_pil(image) for image in draw(params, prompts, None)]
        return grid(drawn), dict(zip(prompts, drawn, strict=True))

    if recipe.stage == "base":
        return sheet
    count, side = len(recipe.sample.prompts), recipe.data.size
    drawn = scenes.sample_scenes(np.arange(count), HELD_OUT_SEED)
    captions = [grammar.caption(scene, np.random.default_rng(0)) for scene in scenes.as_numpy(drawn)]
    truth = np.asarray(scenes.render_scenes(drawn, side), np.float32) / 127.5 - 1.0  # (count, S, S, 3)
    low_res = augment.downsample(jnp.asarray(truth), recipe.data.low_size)
    bilinear = np.asarray(augment.upsample(low_res, side))

    def enlarged(params: Any) -> Sheet:
        own = draw(params, captions, low_res)
        rows = zip(bilinear, own, truth, strict=True)
        single = {caption: to_pil(image) for caption, image in zip(captions, own, strict=True)}
        return grid([to_pil(image) for row in rows for image in row], columns=3), single

    return enlarged
