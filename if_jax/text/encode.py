"""Captions to text states, the conditioning that the U-Nets attend to.

A text encoder is any `apply(params, ids, mask) -> states`, or takes whatever arrays its tokenizer makes (see
`clip_tokens.CaptionReader`); it is called as it comes, so pass a jitted one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from if_jax.text.captions import prepare_captions
from if_jax.text.clip_tokens import CaptionReader
from if_jax.text.tokens import TEXT_LENGTH, Tokenizer

Apply = Callable[..., jax.Array]  # params, the tokenizer's arrays (B, L) -> states (B, L, D)


def encode(
    apply: Apply,
    params: Any,
    tokenizer: Tokenizer | CaptionReader,
    captions: Sequence[str],
    *,
    clean: bool = False,
    preserve_case: bool = False,
    length: int = TEXT_LENGTH,
    batch_size: int = 1,
) -> jax.Array:
    """Encode captions. Equal ones are encoded once.

    Every call of `apply` has `batch_size` rows (the last one filled up), so it compiles once and a caption's states are
    the same bits whatever captions stand beside it.

    Args:
      apply: the encoder, jitted.
      params: its parameters.
      tokenizer: of the encoder.
      captions: B of them.
      clean: clean them as IF does.
      preserve_case: do not lower-case them.
      length: positions of a caption.
      batch_size: captions in one call of `apply`.

    Returns:
      Text states (B, length, D), padded positions included: IF attends to them as well.

    Raises:
      ValueError: there is no caption.
    """
    if not captions:
        raise ValueError("captions is empty: give at least one (the empty string is one)")
    prepared = prepare_captions(captions, clean, preserve_case)
    distinct = list(dict.fromkeys(prepared))
    arrays = tokenizer(distinct, length, always_warn=True)  # (U, length) each
    fill = -len(distinct) % batch_size
    arrays = [np.pad(rows, ((0, fill), (0, 0)), mode="edge") for rows in arrays]
    states = [
        apply(params, *(jnp.asarray(rows[row : row + batch_size]) for rows in arrays))
        for row in range(0, len(arrays[0]), batch_size)
    ]
    places = {caption: row for row, caption in enumerate(distinct)}
    return jnp.concatenate(states)[np.array([places[caption] for caption in prepared])]
