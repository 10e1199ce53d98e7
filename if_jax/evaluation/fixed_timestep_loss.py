"""The loss at fixed timesteps of a released stage: how well chosen noise levels of true pictures are undone.

The error is that of v, whatever the stage predicts: bounded at both ends of the chain, and comparable between releases.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from if_jax.diffusion import augment, process
from if_jax.inference.cascade import Cascade

TIMESTEPS = (50, 250, 500, 750, 950)
_LEVEL = 250  # of the noise on the low-resolution picture
_BATCH = 4


def losses(cascade: Cascade, name: str, pictures: np.ndarray, captions: Sequence[str]) -> dict[str, float]:
    """Measure a stage on true pictures; the noise of a picture depends on its number and the timestep.

    Args:
      cascade: whose text encoder and stage it is.
      name: of the stage, "I", "II" or "III".
      pictures: (B, S, S, 3) in [-1, 1] of the stage's size.
      captions: one for each picture.

    Returns:
      Mean squared error of v at each of `TIMESTEPS` ("t050", …) and their "mean".
    """
    stage = cascade.stage(name)
    text = cascade.embed(captions)
    totals = np.zeros(len(TIMESTEPS))
    for start in range(0, len(pictures), _BATCH):
        rows = np.minimum(np.arange(start, start + _BATCH), len(pictures) - 1)
        used = np.arange(start, start + _BATCH) < len(pictures)
        x0 = jnp.asarray(pictures[rows])
        low = None
        if stage.release.kind == "super-resolution":
            before = cascade.stages[0].unet_config.sample_size
            level = jnp.full(len(rows), _LEVEL, jnp.int32)
            low = stage.noised_low_res(augment.downsample(x0, before), level, _noise(rows, 1_000, x0.shape[1:]))
        for i, timestep in enumerate(TIMESTEPS):
            t = jnp.full(len(rows), timestep, jnp.int32)
            eps = _noise(rows, timestep, x0.shape[1:])
            x_t = process.add_noise(stage.schedule, x0, t, eps)
            guess = stage.denoise(x_t, t, jnp.asarray(text[rows]), low=low)
            v = process.v_from_x0_eps(stage.schedule, guess, t, process.eps_from_x0(stage.schedule, x_t, t, guess))
            error = jnp.square(v - process.v_from_x0_eps(stage.schedule, x0, t, eps)).mean((1, 2, 3))
            totals[i] += float(np.asarray(error)[used].sum())
    means = totals / len(pictures)
    named = {f"t{t:03d}": round(float(mean), 5) for t, mean in zip(TIMESTEPS, means, strict=True)}
    return named | {"mean": round(float(means.mean()), 5)}


def _noise(rows: np.ndarray, purpose: int, shape: tuple[int, ...]) -> jax.Array:
    draw = lambda row: jax.random.normal(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), row), purpose), shape)  # noqa: E731
    return jax.vmap(draw)(jnp.asarray(rows, jnp.uint32))
