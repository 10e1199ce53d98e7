"""What a UNet is told besides picture and step: the text states of one encoder, or of several side by side.

Whatever encoders a recipe names, what they say travels as one array of states (B, L, D): so guidance, negative prompts,
kept states and releases need not know which there are. Of several encoders the rows follow one another, filled up with
zeros to the greatest width, and the UNet's configuration says what each row is (`StatesPart`): tokens of T5, tokens of
CLIP's text encoder, CLIP's vector of the whole caption, CLIP's vector of a picture.

* T5 and CLIP side by side: eDiff-I (Balaji et al. 2022, arXiv:2211.01324), section 4.1. Each is projected by itself.
* A picture's vector as further tokens and in the step embedding: unCLIP (Ramesh et al. 2022, arXiv:2204.06125).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from if_jax.models.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig

StateRows = jax.Array | np.ndarray  # (B, rows, width)
ENCODERS = ("t5", "clip", "clip_image")  # in the order of their rows


@dataclass(frozen=True)
class StatesPart:
    """Rows of the states that one encoder made."""

    encoder: str  # of ENCODERS
    rows: int
    width: int  # of each row; the rest is zero
    tokens: int  # that attention reads: one for each row, or so many made of a single row, or none
    in_step: bool = False  # the row is projected into the step embedding

    def __post_init__(self) -> None:
        if self.encoder not in ENCODERS or self.rows < 1 or self.width < 1 or self.tokens < 0:
            raise ValueError(f"text_parts: {self} is no part of text states")
        if self.tokens not in (0, self.rows) and self.rows != 1:
            raise ValueError(f"text_parts: {self.tokens} tokens cannot be made of {self.rows} rows")


@dataclass(frozen=True)
class CLIPShapes:
    """CLIP as far as a stage reads it; what it does not read is None."""

    text: CLIPTextConfig | None
    vision: CLIPVisionConfig | None
    mean: tuple[float, ...] = (0.0,) * 3  # of the pictures it was trained on, RGB in 0 … 1
    std: tuple[float, ...] = (1.0,) * 3


def parse_encoders(words: str) -> tuple[str, ...]:
    """The encoders of a recipe, "t5+clip", in the order of their rows.

    Raises:
      ValueError: an unknown word, one twice, or none that reads text.
    """
    chosen = [word.strip() for word in words.split("+")]
    if unknown := [word for word in chosen if word not in ENCODERS]:
        raise ValueError(f"{unknown[0]!r} is no encoder: join {', '.join(ENCODERS)} by +, such as t5+clip")
    if len(set(chosen)) < len(chosen):
        raise ValueError("an encoder stands twice: name each once")
    if set(chosen) <= {"clip_image"}:
        raise ValueError("nothing reads the caption: add t5 or clip, such as t5+clip_image")
    return tuple(encoder for encoder in ENCODERS if encoder in chosen)


def parts_of(t5: tuple[int, int] | None, clip: CLIPShapes | None, image_tokens: int) -> tuple[StatesPart, ...]:
    """What the rows of the states are.

    Args:
      t5: (L, D) of its states; None: it is not read.
      clip: what of it is read.
      image_tokens: made of a picture's vector.

    Returns:
      Nothing where T5 is alone: its states are then all there is, of any length.
    """
    if clip is None:
        return ()
    parts = [] if t5 is None else [StatesPart("t5", t5[0], t5[1], t5[0])]
    if clip.text is not None:
        length = clip.text.max_position_embeddings
        parts.append(StatesPart("clip", length, clip.text.hidden_size, length))
        parts.append(StatesPart("clip", 1, clip.text.projection_dim, 0, in_step=True))
    if clip.vision is not None:
        parts.append(StatesPart("clip_image", 1, clip.vision.projection_dim, image_tokens, in_step=True))
    return tuple(parts)


def shape_of(parts: Sequence[StatesPart]) -> tuple[int, int]:
    """(L, D) of the states of several encoders."""
    return sum(part.rows for part in parts), max(part.width for part in parts)


def split(parts: Sequence[StatesPart], states: StateRows) -> list[Any]:
    """The rows of each part, (B, rows, width), of states (B, L, D)."""
    starts = np.cumsum([0, *(part.rows for part in parts)])
    return [states[:, start : start + part.rows, : part.width] for start, part in zip(starts, parts, strict=False)]


def join(parts: Sequence[StatesPart], rows: Sequence[StateRows]) -> jax.Array:
    """States (B, L, D) float32 of the first parts' rows; parts that are left out, and what fills them up, are zero."""
    length, width = shape_of(parts)
    wide = [jnp.pad(jnp.asarray(row, jnp.float32), ((0, 0), (0, 0), (0, width - row.shape[-1]))) for row in rows]
    joined = jnp.concatenate(wide, axis=1)
    return jnp.pad(joined, ((0, 0), (0, length - joined.shape[1]), (0, 0)))


def keep(parts: Sequence[StatesPart], states: jax.Array, kept: Mapping[str, jax.Array]) -> jax.Array:
    """The states with the rows of an encoder zero where it is dropped.

    Args:
      parts: of the states.
      states: (B, L, D).
      kept: by encoder, (B,) bool; others are kept.
    """
    rows = [
        row if part.encoder not in kept else jnp.where(kept[part.encoder][:, None, None], row, 0)
        for part, row in zip(parts, split(parts, states), strict=True)
    ]
    return join(parts, rows)


def with_picture(parts: Sequence[StatesPart], states: StateRows, vectors: StateRows) -> jax.Array:
    """The states (B, L, D) with pictures' vectors (B, width) in their row, which comes last."""
    return join(parts, [*split(parts[:-1], states), vectors[:, None]])


def clip_text_rows(config: CLIPTextConfig, params: Mapping, ids: jax.Array, dtype: DTypeLike) -> list[jax.Array]:
    """CLIP's states and its vector of each caption, as the rows of their parts.

    Args:
      config: of CLIP's text encoder.
      params: its parameters.
      ids: (B, L).
      dtype: to compute in.
    """
    states, pooled = CLIPText(config, dtype=jnp.dtype(dtype)).apply({"params": params}, ids)
    return [cast(jax.Array, states), _normalised(cast(jax.Array, pooled))[:, None]]


def picture_vectors(shapes: CLIPShapes, params: Mapping, pictures: jax.Array, dtype: DTypeLike) -> jax.Array:
    """CLIP's vectors of pictures, their entries of about the size of text states.

    Args:
      shapes: with the picture encoder.
      params: its parameters.
      pictures: (B, H, W, 3) in [-1, 1]; each is stretched to CLIP's square by the antialiased bicubic filter.
      dtype: to compute in.

    Returns:
      (B, projection_dim) float32.
    """
    assert shapes.vision is not None
    side = shapes.vision.image_size
    fitted = jax.image.resize(pictures, (pictures.shape[0], side, side, 3), "cubic", antialias=True)
    pixels = (jnp.clip(fitted / 2 + 0.5, 0, 1) - jnp.asarray(shapes.mean)) / jnp.asarray(shapes.std)
    _, vectors = CLIPVision(shapes.vision, dtype=jnp.dtype(dtype)).apply({"params": params}, pixels)
    return _normalised(cast(jax.Array, vectors))


def _normalised(vectors: jax.Array) -> jax.Array:
    """Vectors (B, D) at the length √D."""
    vectors = vectors.astype(jnp.float32)
    return vectors * jax.lax.rsqrt(jnp.mean(jnp.square(vectors), -1, keepdims=True) + 1e-12)
