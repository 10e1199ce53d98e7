"""The fixed-timestep loss: how well chosen noise levels of held-out pictures are predicted, one number per timestep.

A training loss mixes timesteps at random and hardly moves; the loss at fixed timesteps, on fixed pictures with fixed
noise, falls as pictures get better. The noise of a sample at a timestep depends on the sample's number and the timestep
alone, so the figures are the same whatever the batch size or the number of devices.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from if_jax.checkpoints.weights import Params
from if_jax.config import Recipe
from if_jax.data import pipeline
from if_jax.data.index import Filter
from if_jax.diffusion import augment, process
from if_jax.diffusion.schedule import cosine_schedule
from if_jax.parallel import rules
from if_jax.text.clip_tokens import CaptionReader
from if_jax.training.objective import Networks, training_schedule


def check_source(recipe: Recipe) -> None:
    """Opens the held-out pictures where the run will look at them, so that it is not stopped by them hours later.

    Raises:
      ValueError: they cannot be read; names the recipe key and its value.
    """
    v, data = recipe.validation, recipe.data
    if not v.every and not (recipe.sample.every and recipe.stage == "super-resolution"):
        return
    try:
        pipeline.open_source(v.source, data.size, v.seed, data.preparation, Filter(), data.remote, data.exclude)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"recipe key validation.source is {v.source!r}: {error}") from None


def make_validation(
    recipe: Recipe, networks: Networks, read: CaptionReader, frozen: Params, batch_sharding: NamedSharding
) -> Callable[[Params], dict[str, float]]:
    """Makes the function that measures a run.

    The pictures are drawn or read anew each time, always the same ones: `validation.samples` from the start of the
    source, full frames, captions kept.

    Args:
      recipe: what is trained.
      networks: its modules.
      read: turns captions into what the encoders take.
      frozen: parameters by network that are not trained.
      batch_sharding: of a batch on the mesh.

    Returns:
      `validate(params) -> {"validation/t050": mean squared error, …, "validation/mean": …}`.
    """
    v = recipe.validation
    mesh = batch_sharding.mesh
    # Every process reads the whole figures, so they are replicated.
    error = jax.jit(_make_error(recipe, networks), out_shardings=rules.replicated(mesh))
    ways = math.prod(mesh.shape[axis] for axis in batch_sharding.spec[0])
    size = -(-v.batch_size // ways) * ways  # what does not divide over the devices is enlarged

    def validate(params: Params) -> dict[str, float]:
        totals, count = np.zeros(len(v.timesteps)), 0
        for host in itertools.islice(_batches(recipe, read, size), -(-v.samples // size)):
            used = np.arange(count, count + size) < v.samples  # the last batch may be filled up
            batch = {name: jax.device_put(host[name], batch_sharding) for name in ("image", *read.names)}
            numbers = jax.device_put(np.arange(count, count + size, dtype=np.int32), batch_sharding)
            totals += np.asarray(error(params, frozen, batch, numbers))[:, used].sum(1, dtype=np.float64)
            count += size
        means = totals / v.samples
        named = {f"validation/t{t:03d}": float(mean) for t, mean in zip(v.timesteps, means, strict=True)}
        return named | {"validation/mean": float(means.mean())}

    return validate


def _batches(recipe: Recipe, read: CaptionReader, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    v, data = recipe.validation, recipe.data
    preparation = dataclasses.replace(data.preparation, shift=0.0)
    return pipeline.batches(
        pipeline.open_source(v.source, data.size, v.seed, preparation, Filter(), data.remote, data.exclude),
        size=data.size,
        batch_size=batch_size,
        seed=v.seed,
        tokenize=read,
        text_names=read.names,
        caption_dropout=0.0,
        threads=0,
        preparation=preparation,
    )


def _make_error(recipe: Recipe, networks: Networks) -> Callable[..., jax.Array]:
    """error(params, frozen, batch, numbers (B,)) -> squared error by timestep and sample, (T, B) float32."""
    schedule, v = training_schedule(recipe), recipe.validation

    def error(params: Params, frozen: Params, batch: dict[str, jax.Array], numbers: jax.Array) -> jax.Array:
        x0 = batch["image"].astype(jnp.float32) / 127.5 - 1.0  # (B, S, S, 3)
        whole = networks.joined(frozen, params)
        states = networks.encode(whole, batch)
        low, level = None, None
        if recipe.stage == "super-resolution":
            low = augment.upsample(augment.downsample(x0, recipe.data.low_size), recipe.data.size)
            level = jnp.full(numbers.shape, v.aug_level, jnp.int32)
            noise = process.sample_noise(v.seed, numbers, 1000, x0.shape[1:])
            low = augment.noise_augment(cosine_schedule(), low, level, noise)
        network = lambda x, t: networks.predict(whole["unet"], x, t, states, level)  # noqa: E731

        def at(timestep: jax.Array) -> jax.Array:
            t = jnp.full(numbers.shape, timestep)
            eps = process.sample_noise(v.seed, numbers, timestep, x0.shape[1:])
            _, output = process.noise_and_predict(schedule, network, x0, t, eps, low)
            predicted, _ = process.split_model_output(output)
            target = process.prediction_target(schedule, recipe.prediction, x0, t, eps)
            return jnp.mean((target - predicted) ** 2, (1, 2, 3))

        return jax.lax.map(at, jnp.asarray(v.timesteps, jnp.int32))

    return error
