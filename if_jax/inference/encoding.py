"""What a cascade's stages are told, made by its encoders: text states of captions, and vectors of pictures to vary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from if_jax.checkpoints.stages import StageDefaults, StageRelease
from if_jax.checkpoints.weights import Params
from if_jax.inference import inputs, loading
from if_jax.inference.inputs import Picture
from if_jax.inference.loading import Placement
from if_jax.models.conditioning import CLIPShapes, StatesPart, clip_text_rows, join, picture_vectors, with_picture
from if_jax.models.t5 import T5Config, T5Encoder
from if_jax.text.encode import encode


def encode_captions(
    base: StageRelease, default: StageDefaults, placement: Placement, captions: Sequence[str], clean: bool
) -> np.ndarray:
    """Text states of captions.

    Args:
      base: the stage that brings the encoders, on the device unless `placement.low_memory`.
      default: how it draws: tokens and case of captions.
      placement: where its weights lie.
      captions: B of them.
      clean: clean them by IF's rules first.

    Returns:
      (B, L, D) float32; rows of a picture are zero.
    """
    shapes, parts = base.clip.shapes if base.clip else None, base.unet_config.text_parts
    static = {"config": base.text_config, "shapes": shapes, "parts": parts, "dtype": jnp.dtype(placement.dtype)}
    params = {**(base.clip.params if base.clip else {})}
    if base.text_params is not None:
        params["text_encoder"] = loading.place_text(base, placement) if placement.low_memory else base.text_params
    prepared = {"clean": clean, "preserve_case": default.preserve_case, "length": default.text_length}
    read = base.caption_reader(default.text_length)
    # Two rows, prompt and empty caption, are the commonest case; equal captions are encoded once.
    return np.asarray(encode(partial(_encode, **static), params, read, captions, **prepared, batch_size=2))


def encode_pictures(base: StageRelease, placement: Placement, pictures: Picture | Sequence[Picture]) -> np.ndarray:
    """CLIP's vectors of pictures, (B, width) float32, of their middle squares.

    Args:
      base: the stage that brings the encoders.
      placement: where its weights lie.
      pictures: to vary.

    Raises:
      ValueError: the stage reads no pictures; or something is no picture.
    """
    if base.clip is None or base.clip.shapes.vision is None:
        raise ValueError("vary: this cascade was trained on captions alone; leave it out")
    every = pictures if isinstance(pictures, list | tuple) else [cast(Picture, pictures)]
    side = base.unet_config.sample_size  # as training shows them to CLIP: squares of the stage's own size
    fitted = [
        inputs.fit_picture(inputs.middle(inputs.read_picture(picture, "vary")), (side, side)) for picture in every
    ]
    apply = partial(
        _encode_picture, base.clip.shapes, base.clip.params["clip_vision"], dtype=jnp.dtype(placement.dtype)
    )
    return np.concatenate([np.asarray(apply(row[None])) for row in fitted])


def with_vectors(base: StageRelease, states: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Text states (B, L, D) with the vectors (B, width) of pictures in their row."""
    return np.asarray(with_picture(base.unet_config.text_parts, states, vectors))


@partial(jax.jit, static_argnames=("config", "shapes", "parts", "dtype"))
def _encode(
    params: Mapping[str, Params],
    *arrays: jax.Array,
    config: T5Config | None,
    shapes: CLIPShapes | None,
    parts: tuple[StatesPart, ...],
    dtype: jnp.dtype,
) -> jax.Array:
    """Text states of a `CaptionReader`'s arrays."""
    rows = []
    if config is not None:
        own = loading.dequantize(params["text_encoder"], dtype)
        rows.append(T5Encoder(config, dtype=dtype).apply({"params": own}, *arrays[:2]))
    if shapes is not None and shapes.text is not None:
        rows += clip_text_rows(shapes.text, params["clip_text"], arrays[-1], dtype)
    return cast(jax.Array, join(parts, rows) if parts else rows[0])


_encode_picture = jax.jit(picture_vectors, static_argnums=0, static_argnames="dtype")
