"""What training draws at random: every use has a named stream, and a step draws for its whole batch at once.

All streams follow from the recipe's seed: `fold_in` of a number that no other use has. So no two of them can give the
same values, and what is drawn for a row does not depend on the parts or the devices that a batch is spread over.
"""

from __future__ import annotations

from typing import Any

import jax

from if_jax.config import Recipe
from if_jax.diffusion import augment

_TIMESTEPS = 1000  # of the chain
STREAMS = {
    # of the recipe's seed
    "unet weights": 0,
    "text encoder weights": 1,
    "steps": 2,  # and of it one stream for each step, whose own are below
    "sample sheets": 3,
    "factors": 11,  # of a LoRA
    # of a step
    "timesteps": 4,
    "noise": 5,
    "pooled dropout": 6,
    "crops": 7,
    "noise levels": 8,
    "low-resolution noise": 9,
    "low-resolution blur": 10,
    "factor dropout": 12,
    "t5 dropout": 13,
    "clip dropout": 14,
    "clip_image dropout": 15,
}


def stream(key: jax.Array, name: str) -> jax.Array:
    """The key of one use of randomness.

    Args:
      key: of the recipe's seed, or of a step.
      name: one of `STREAMS`.
    """
    return jax.random.fold_in(key, STREAMS[name])


def step_key(seed: int, step: jax.Array | int) -> jax.Array:
    """The key of one training step.

    Args:
      seed: the recipe's.
      step: batches consumed before it.
    """
    return jax.random.fold_in(stream(jax.random.key(seed), "steps"), step)


def draw(recipe: Recipe, rows: int, key: jax.Array) -> dict[str, jax.Array]:
    """Draws all that the loss of one step needs, a row for each picture of the whole batch.

    Args:
      recipe: what is trained.
      rows: pictures B of the batch.
      key: of the step.

    Returns:
      "t" (B,) int32 and "eps" (B, S, S, 3); with `pooled_dropout` "pooled_kept" (B,) bool; with a dropout of an encoder
      "t5_kept", "clip_kept" or "clip_image_kept" (B,) bool; with `lora.dropout`
      "dropout_keys" (B, 2) uint32, data of a key for each row; for super-resolution "level"
      (B,) int32 and "low_eps" (B, S, S, 3), with `data.crop` "corner" (B, 2) int32, the corners of the crops in
      low-resolution pixels, with `data.low_blur` "sigma" (B,). S is the side of what is trained on.
    """
    data, random = recipe.data, jax.random
    shape = (rows, *(data.crop or data.size,) * 2, 3)
    drawn: dict[str, Any] = {
        "t": _timesteps(recipe, rows, stream(key, "timesteps")),
        "eps": random.normal(stream(key, "noise"), shape),
    }
    if recipe.pooled_dropout:
        drawn["pooled_kept"] = random.bernoulli(stream(key, "pooled dropout"), 1 - recipe.pooled_dropout, (rows,))
    for encoder, share in recipe.dropped.items():
        drawn[f"{encoder}_kept"] = random.bernoulli(stream(key, f"{encoder} dropout"), 1 - share, (rows,))
    if recipe.lora.dropout:
        drawn["dropout_keys"] = random.key_data(random.split(stream(key, "factor dropout"), rows))
    if recipe.stage != "super-resolution":
        return drawn
    drawn["level"] = augment.random_level(stream(key, "noise levels"), rows, data.max_aug_level)
    drawn["low_eps"] = random.normal(stream(key, "low-resolution noise"), shape)
    if data.crop:
        places = (data.size - data.crop) // (data.size // data.low_size) + 1
        drawn["corner"] = random.randint(stream(key, "crops"), (rows, 2), 0, places)
    if data.low_blur:
        drawn["sigma"] = augment.random_sigma(stream(key, "low-resolution blur"), rows, data.low_blur)
    return drawn


def _timesteps(recipe: Recipe, rows: int, key: jax.Array) -> jax.Array:
    """(rows,) of the whole chain, or of those that a student is trained at."""
    if not recipe.distill.method:
        return jax.random.randint(key, (rows,), 0, _TIMESTEPS)
    chosen = recipe.distill.timesteps
    return chosen.start + chosen.step * jax.random.randint(key, (rows,), 0, len(chosen))
