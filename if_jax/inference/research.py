"""One stage from inside: what its network says, its denoiser, and gradients through both."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from if_jax.checkpoints.stages import StageRelease
from if_jax.diffusion import augment, guidance, process
from if_jax.diffusion.schedule import Schedule, cosine_schedule
from if_jax.inference.denoise_stage import Conditioning, make_denoiser
from if_jax.models.unet import UNetConfig


@dataclass(frozen=True, eq=False)
class OpenStage:
    """A stage whose network can be called, jitted and differentiated; made by `Cascade.stage`.

    Everywhere x (B, H, W, 3) float32, t (B,) int timesteps of the training chain, text (B, L, D) of `Cascade.embed`.
    `low`, for a super-resolution stage: what `noised_low_res` gives.
    """

    release: StageRelease
    dtype: Any = jnp.float32

    @property
    def schedule(self) -> Schedule:
        """The training chain, whose tables t indexes."""
        return self.release.scheduler.schedule()

    def noised_low_res(
        self, low_res: jax.Array, level: jax.Array, eps: jax.Array, size: int | tuple[int, int] | None = None
    ) -> dict[str, jax.Array]:
        """What a super-resolution stage is shown of low_res (B, h, w, 3): noised to level (B,) by eps (B, H, W, 3)."""
        up = augment.upsample(low_res, size or self.release.unet_config.sample_size)
        return {"low": augment.noise_augment(cosine_schedule(), up, level, eps), "level": level}

    def predict(
        self, x_t: jax.Array, t: jax.Array, text: jax.Array, low: dict[str, jax.Array] | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """(ε̂, variance channels), (B, H, W, 3) each; a net that predicts v or x0 is converted."""
        return self._eps(x_t, t, self._run(({"text": text} | (low or {}),), 1.0, x_t, t))

    def denoise(
        self,
        x_t: jax.Array,
        t: jax.Array,
        text: jax.Array,
        uncond: jax.Array | None = None,
        guidance_scale: float | jax.Array = 1.0,
        low: dict[str, jax.Array] | None = None,
    ) -> jax.Array:
        """x̂0 (B, H, W, 3), guided where `uncond` is given, not thresholded (which would cut its gradient)."""
        branches = tuple({"text": states} | (low or {}) for states in (text, uncond) if states is not None)
        predicted, _ = process.split_model_output(self._run(branches, guidance_scale, x_t, t))
        return process.x0_from_prediction(self.schedule, self.release.scheduler.prediction, x_t, t, predicted)

    def score_distillation(
        self,
        x0: jax.Array,
        t: jax.Array,
        eps: jax.Array,
        text: jax.Array,
        uncond: jax.Array,
        guidance_scale: float | jax.Array = 20.0,
        low: dict[str, jax.Array] | None = None,
    ) -> jax.Array:
        """The gradient (1 − ᾱ_t)(ε̂ − ε) that moves pictures x0 towards their texts; chain it into what has made x0.

        Source: Poole et al. 2022 (arXiv:2209.14988), eq. 3: the network's own Jacobian is left out.
        """
        guide = partial(self.denoise, text=text, uncond=uncond, guidance_scale=guidance_scale, low=low)
        x_t, guided = process.noise_and_predict(self.schedule, guide, x0, t, eps)
        weight = jnp.asarray(self.schedule.sqrt_one_minus_alpha_bar)[t].reshape(-1, 1, 1, 1) ** 2
        return jax.lax.stop_gradient(weight * (process.eps_from_x0(self.schedule, x_t, t, guided) - eps))

    def _run(
        self, branches: tuple[Conditioning, ...], guidance_scale: float | jax.Array, x_t: jax.Array, t: jax.Array
    ) -> jax.Array:
        config, dtype = self.release.unet_config, jnp.dtype(self.dtype)
        return _guided(self.release.unet_params, branches, guidance_scale, x_t, t, config=config, dtype=dtype)

    def _eps(self, x_t: jax.Array, t: jax.Array, out: jax.Array) -> tuple[jax.Array, jax.Array]:
        predicted, variance = process.split_model_output(out)
        prediction = self.release.scheduler.prediction
        if prediction == "eps":
            return predicted, variance
        x0 = process.x0_from_prediction(self.schedule, prediction, x_t, t, predicted)
        return process.eps_from_x0(self.schedule, x_t, t, x0), variance


@partial(jax.jit, static_argnames=("config", "dtype"))
def _guided(
    params: Any,
    branches: tuple[Conditioning, ...],
    guidance_scale: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    *,
    config: UNetConfig,
    dtype: Any,
) -> jax.Array:
    """What the network says (B, H, W, 6); compiled, so that calls outside a user's own `jit` are fast as well."""
    return make_denoiser(params, config, branches, guidance.classifier_free(guidance_scale), dtype)(x_t, t)
