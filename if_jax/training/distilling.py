"""What a student is trained on: that its jumps land where those of its frozen teacher do, see `diffusion.distillation`.

The teacher is the UNet of a release, used beside what is trained as the base of a LoRA is: in the compute precision,
sharded by the same rules, in neither optimizer, EMA nor checkpoint. It sees the same x_t, text and low-resolution
picture as its student, and draws at its own guidance scale; the student has one branch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from if_jax.checkpoints.weights import Params
from if_jax.config import Recipe
from if_jax.diffusion import distillation, guidance, process
from if_jax.diffusion.distillation import Believe
from if_jax.parallel import rules
from if_jax.training.objective import Networks, by_timestep, picture_inputs, training_schedule
from if_jax.training.stage import make_scheduler
from if_jax.training.step import Batch


def make_loss(networks: Networks, recipe: Recipe) -> Callable[[Params, Params, Batch, Batch], tuple[jax.Array, dict]]:
    """Makes the loss of a student.

    Returns:
      `loss(params, frozen, batch, drawn) -> (mean loss, metrics)`, as `objective.make_loss`; frozen holds besides
      "teacher", the parameters of a UNet, and, where that is guided, "empty": the text states (1, L, D) of no caption.
    """
    own, schedule, scheduler = recipe.distill, training_schedule(recipe), make_scheduler(recipe)
    sharding_rules = rules.PRESETS[recipe.mesh.rules]

    def loss(params: Params, frozen: Params, batch: Batch, drawn: Batch) -> tuple[jax.Array, dict]:
        image = batch["image"].astype(jnp.float32) / 127.5 - 1.0  # (B, S, S, 3)
        whole = networks.joined(frozen, params)
        states = networks.encode(whole, batch)
        x0, low_res, level = picture_inputs(recipe, image, drawn)
        x_t, t = process.add_noise(schedule, x0, drawn["t"], drawn["eps"]), drawn["t"]

        def believe(unet: Params, bounded: bool, guided: bool = False) -> Believe:
            unet = rules.gather_convolutions(unet, sharding_rules)

            def net(x: jax.Array, t: jax.Array, seen: Any) -> jax.Array:
                text, low_res, level = seen
                x = x if low_res is None else jnp.concatenate([x, low_res], -1)
                return networks.predict(unet, x, t, text, level).astype(jnp.float32)

            denoise: guidance.Denoiser = partial(net, seen=(states, low_res, level))
            if guided:
                branches = [(text, low_res, level) for text in (states, frozen["empty"])]
                denoise = guidance.guided(net, branches, guidance.classifier_free(own.guidance_scale))

            def x0_hat(x: jax.Array, t: jax.Array) -> jax.Array:
                predicted, _ = process.split_model_output(denoise(x, t))
                believed = process.x0_from_prediction(schedule, recipe.prediction, x, t, predicted)
                if not bounded:
                    return believed
                return guidance.dynamic_threshold(
                    believed, scheduler.dynamic_thresholding_ratio, scheduler.sample_max_value
                )

            return x0_hat

        teacher = believe(frozen["teacher"], bounded=True, guided=own.guidance_scale != 1)
        student = believe(jax.lax.stop_gradient(params["unet"]), bounded=True)
        wanted = distillation.target(
            own.method or "progressive", schedule, teacher, student, x_t, t, own.steps, own.substeps
        )
        parts = distillation.distillation_loss(schedule, believe(params["unet"], bounded=False)(x_t, t), wanted, t)
        metrics = {name: jnp.mean(value) for name, value in parts.items()}
        return metrics["loss"], metrics | by_timestep(parts["mse"], t)

    return loss
