"""The loss at fixed timesteps of a released stage: how well chosen noise levels of true pictures are undone.

The error is that of v, whatever the stage predicts: bounded at both ends of the chain, and comparable between releases.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

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
        x0, samples = jnp.asarray(pictures[rows]), jnp.asarray(rows, jnp.uint32)
        low = None
        if stage.release.kind == "super-resolution":
            before = cascade.stages[0].unet_config.sample_size
            level = jnp.full(len(rows), _LEVEL, jnp.int32)
            noise = process.sample_noise(0, samples, 1_000, x0.shape[1:])
            low = stage.noised_low_res(augment.downsample(x0, before), level, noise)
        denoise = partial(stage.denoise, text=jnp.asarray(text[rows]), low=low)
        for i, timestep in enumerate(TIMESTEPS):
            t = jnp.full(len(rows), timestep, jnp.int32)
            eps = process.sample_noise(0, samples, timestep, x0.shape[1:])
            x_t, guess = process.noise_and_predict(stage.schedule, denoise, x0, t, eps)
            v = process.prediction_from_x0(stage.schedule, "v", x_t, t, guess)
            error = jnp.square(v - process.v_from_x0_eps(stage.schedule, x0, t, eps)).mean((1, 2, 3))
            totals[i] += float(np.asarray(error)[used].sum())
    means = totals / len(pictures)
    named = {f"t{t:03d}": round(float(mean), 5) for t, mean in zip(TIMESTEPS, means, strict=True)}
    return named | {"mean": round(float(means.mean()), 5)}
