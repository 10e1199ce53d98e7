"""One stage from inside: what its network says, its denoiser, and gradients through both."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from if_jax.checkpoints.stages import StageRelease
from if_jax.checkpoints.weights import Params
from if_jax.diffusion import guidance, process
from if_jax.diffusion.schedule import Array, Schedule
from if_jax.inference.denoise_stage import Conditioning, LowRes, make_denoiser, noised_low_res
from if_jax.models.unet import UNetConfig


@dataclass(frozen=True, eq=False)
class OpenStage:
    """A stage whose network can be called, jitted and differentiated; made by `Cascade.stage`.

    Everywhere images are (B, H, W, 3) float32; t (B,) are int timesteps of the training chain; text and uncond
    (B, L, D) are text states of `Cascade.embed`; low, for a super-resolution stage, is what `noised_low_res` returns.
    """

    release: StageRelease
    dtype: DTypeLike = jnp.float32

    @property
    def schedule(self) -> Schedule:
        """The training chain, whose tables t indexes."""
        return self.release.scheduler.schedule()

    def noised_low_res(
        self, low_res: Array, level: Array, eps: Array, size: int | tuple[int, int] | None = None
    ) -> LowRes:
        """What a super-resolution stage sees of low-resolution pictures.

        Args:
          low_res: (B, h, w, 3) in [-1, 1].
          level: (B,) int, the noise level, a timestep of the cosine chain.
          eps: (B, H, W, 3), the noise.
          size: H = W or (H, W), unless it is the stage's own square.
        """
        return noised_low_res(low_res, level, eps, size or self.release.unet_config.sample_size)

    def predict(self, x_t: Array, t: Array, text: Array, low: LowRes | None = None) -> tuple[jax.Array, jax.Array]:
        """What the network says, without guidance; see the class for the arguments.

        Returns:
          ε̂ and the variance channels, (B, H, W, 3) each; a net that predicts v or x0 is converted.
        """
        predicted, variance = self._run((Conditioning(text, low),), 1.0, x_t, t)
        prediction = self.release.scheduler.prediction
        if prediction == "eps":
            return predicted, variance
        x0 = process.x0_from_prediction(self.schedule, prediction, x_t, t, predicted)
        return process.eps_from_x0(self.schedule, x_t, t, x0), variance

    def denoise(
        self,
        x_t: Array,
        t: Array,
        text: Array,
        uncond: Array | None = None,
        guidance_scale: float | jax.Array = 1.0,
        low: LowRes | None = None,
    ) -> jax.Array:
        """x̂0 (B, H, W, 3), guided where `uncond` is there, not thresholded (which would cut its gradient)."""
        branches = tuple(Conditioning(states, low) for states in (text, uncond) if states is not None)
        predicted, _ = self._run(branches, guidance_scale, x_t, t)
        return process.x0_from_prediction(self.schedule, self.release.scheduler.prediction, x_t, t, predicted)

    def score_distillation(
        self,
        x0: Array,
        t: Array,
        eps: Array,
        text: Array,
        uncond: Array,
        guidance_scale: float | jax.Array = 20.0,
        low: LowRes | None = None,
    ) -> jax.Array:
        """The gradient (1 − ᾱ_t)(ε̂ − ε) that moves pictures x0 towards their texts; chain it into what has made x0.

        Source: Poole et al. 2022 (arXiv:2209.14988), eq. 3: the network's own Jacobian is left out.

        Args:
          x0: (B, H, W, 3), the pictures.
          t: (B,) int, the timesteps they are noised to.
          eps: (B, H, W, 3), the noise ε.
          text: (B, L, D), of the prompts.
          uncond: (B, L, D), of the empty caption.
          guidance_scale: of ε̂.
          low: super-resolution only, see the class.

        Returns:
          (B, H, W, 3), detached.
        """
        guide = partial(self.denoise, text=text, uncond=uncond, guidance_scale=guidance_scale, low=low)
        x_t, guided = process.noise_and_predict(self.schedule, guide, x0, t, eps)
        weight = jnp.asarray(self.schedule.sqrt_one_minus_alpha_bar)[t].reshape(-1, 1, 1, 1) ** 2
        return jax.lax.stop_gradient(weight * (process.eps_from_x0(self.schedule, x_t, t, guided) - eps))

    def _run(
        self, branches: tuple[Conditioning, ...], guidance_scale: float | jax.Array, x_t: Array, t: Array
    ) -> tuple[jax.Array, jax.Array]:
        """The (guided) prediction and the variance channels, (B, H, W, 3) each."""
        config, dtype = self.release.unet_config, jnp.dtype(self.dtype)
        out = _guided(self.release.unet_params, branches, guidance_scale, x_t, t, config=config, dtype=dtype)
        return process.split_model_output(out)


@partial(jax.jit, static_argnames=("config", "dtype"))
def _guided(
    params: Params,
    branches: tuple[Conditioning, ...],
    guidance_scale: float | jax.Array,
    x_t: Array,
    t: Array,
    *,
    config: UNetConfig,
    dtype: DTypeLike,
) -> jax.Array:
    """What the network says (B, H, W, 6); compiled, so that calls outside a user's own `jit` are fast as well."""
    x, steps = jnp.asarray(x_t), jnp.asarray(t)
    return make_denoiser(params, config, branches, guidance.classifier_free(guidance_scale), dtype)(x, steps)
