"""IF's training loss: the noise by least squares, its variance by the variational bound.

    (1)  L      = ‖ε − ε̂‖² / D + (N / 1000) · L_vb                 (‖v − v̂‖² for a net that predicts the velocity)
    (2)  L_vb   = KL( q(x_{t−1} | x_t, x0) ‖ p(x_{t−1} | x_t) ) / D           t > 0
                = −ln p(x0 | x_1) / D, x0 one of 256 levels in [−1, 1]        t = 0       both in bits, / ln 2
    (3)  p(x_{t−1} | x_t) = N(posterior mean at x̂0(ε̂), σ²),  σ² from the variance channels

D = H · W · C. Inside L_vb the prediction is detached, so the bound trains nothing but the variance. Because t is drawn
uniformly out of N steps, L_vb alone would be 1/N of the bound; N / 1000 keeps its weight the same for any N.

Source: Nichol & Dhariwal 2021 (arXiv:2102.09672), section 3.1; Ho et al. 2020 (arXiv:2006.11239), eq. 13.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from if_jax.diffusion.process import (
    Prediction,
    learned_range_log_variance,
    posterior,
    prediction_target,
    split_model_output,
    x0_from_prediction,
)
from if_jax.diffusion.schedule import Schedule

Weight = Literal["none", "min-snr", "sigmoid"]
_MIN_SNR_GAMMA, _SIGMOID_BIAS = 5.0, 2.0


def hybrid_loss(
    schedule: Schedule,
    model_output: jax.Array,
    x0: jax.Array,
    x_t: jax.Array,
    eps: jax.Array,
    t: jax.Array,
    *,
    prediction: Prediction = "eps",
    weight: Weight = "none",
    bound_weight: float = 1.0,
) -> dict[str, jax.Array]:
    """The loss of each image.

    Args:
      schedule: the chain that t indexes.
      model_output: (B, H, W, 2C), the prediction and the variance channels.
      x0: (B, H, W, C).
      x_t: (B, H, W, C), x0 noised.
      eps: (B, H, W, C), the noise.
      t: (B,) int.
      prediction: what the first C channels mean: IF's ε, or the velocity, whose error at x_t is the ε error divided
        by √ᾱ_t: the noisy steps, which decide the composition, weigh more.
      weight: see `loss_weight`.
      bound_weight: b. Where a net predicts x0 well the bound is far larger than the squared error, and its gradient
        reaches all layers through the variance channels; a small b leaves these untrained, and 0 says so.

    Returns:
      {"loss": w · mse + b · vb · N/1000, "mse", "vb" in bits per dimension}, each (B,) float32.
    """
    model_output, x0, x_t, eps = (a.astype(jnp.float32) for a in (model_output, x0, x_t, eps))
    predicted, variance = split_model_output(model_output)
    mse = _mean_flat((prediction_target(schedule, prediction, x0, t, eps) - predicted) ** 2)
    x0_hat = x0_from_prediction(schedule, prediction, x_t, t, jax.lax.stop_gradient(predicted))
    vb = variational_bound(schedule, x0_hat, variance, x0, x_t, t)
    weighted = loss_weight(schedule, prediction, weight, t) * mse
    return {"loss": weighted + vb * (bound_weight * schedule.num_steps / 1000), "mse": mse, "vb": vb}


def loss_weight(schedule: Schedule, prediction: Prediction, weight: Weight, t: jax.Array) -> jax.Array:
    """The weight by which the squared error of the prediction counts; with λ = ln SNR:

        none      1, whatever is predicted
        min-snr   min(SNR, 5) / SNR         on the ε error
        sigmoid   σ(2 − λ) · |dλ/du| / 2π   on the ε error, u = t / N

    The ε error is ᾱ times the v error and SNR times the x0 error. |dλ/du| takes back how densely uniform steps of the
    schedule, shifted or not, lie along λ, so that λ as such is weighted by the sigmoid; along the cosine schedule
    |dλ/du| / 2π is cosh(λ / 2), some hundreds at both ends: clip gradients.
    Sources: Hang et al. 2023 (arXiv:2303.09556), eq. 8; Kingma & Gao 2023 (arXiv:2303.00848), section 4.3, bias 2.

    Args:
      schedule: the training chain, its tables known while tracing.
      prediction: what the net predicts.
      weight: one of the three names above.
      t: (B,) int.

    Returns:
      (B,) float32.

    Raises:
      ValueError: for another name, or a schedule that is traced.
    """
    if weight == "none":
        return jnp.ones(t.shape, jnp.float32)
    if weight not in get_args(Weight):
        raise ValueError(f"loss weight is {weight!r}: use one of {', '.join(get_args(Weight))}")
    if not isinstance(schedule.alpha_bar, np.ndarray):
        raise ValueError("loss weights are made from the training schedule, outside any compiled function")
    alpha_bar = np.asarray(schedule.alpha_bar, np.float64)
    snr = alpha_bar / (1 - alpha_bar)
    spacing = np.abs(np.gradient(np.log(snr), 1 / len(snr))) / (2 * np.pi)
    on_eps = {
        "min-snr": np.minimum(snr, _MIN_SNR_GAMMA) / snr,
        "sigmoid": spacing / (1 + snr * np.exp(-_SIGMOID_BIAS)),
    }
    scale = {"eps": 1.0, "v": alpha_bar, "x0": snr}[prediction]
    return jnp.asarray(on_eps[weight] * scale, jnp.float32)[t]


def variational_bound(
    schedule: Schedule, x0_hat: jax.Array, v: jax.Array, x0: jax.Array, x_t: jax.Array, t: jax.Array
) -> jax.Array:
    """The variational bound L_vb of equation (2).

    Args:
      schedule: the chain that t indexes.
      x0_hat: (B, H, W, C), the net's x̂0, not clipped.
      v: (B, H, W, C), the variance channels.
      x0: (B, H, W, C).
      x_t: (B, H, W, C), x0 noised.
      t: (B,) int.

    Returns:
      (B,), bits per dimension.
    """
    true_mean, true_log_variance = posterior(schedule, x0, x_t, t)
    mean, _ = posterior(schedule, x0_hat, x_t, t)
    log_variance = learned_range_log_variance(schedule, v, t)
    kl = _mean_flat(gaussian_kl(true_mean, true_log_variance, mean, log_variance))
    nll = _mean_flat(-discretized_gaussian_log_likelihood(x0, mean, log_variance))
    return jnp.where(t == 0, nll, kl) / np.log(2.0)


def gaussian_kl(mean1: jax.Array, log_variance1: jax.Array, mean2: jax.Array, log_variance2: jax.Array) -> jax.Array:
    """KL(N(mean1, e^log_variance1) ‖ N(mean2, e^log_variance2)), elementwise, in nats."""
    log_ratio = log_variance1 - log_variance2
    return 0.5 * (jnp.exp(log_ratio) - log_ratio - 1 + (mean1 - mean2) ** 2 * jnp.exp(-log_variance2))


def discretized_gaussian_log_likelihood(x: jax.Array, mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """ln of the mass that N(mean, e^log_variance) puts on the 8-bit level of x in [−1, 1], elementwise, in nats.

    Levels are 2/255 apart; the outermost two reach to infinity. Masses are floored at 1e-12, which also keeps
    the gradients finite.
    """
    half_level = 1.0 / 255.0
    inv_std = jnp.exp(-0.5 * log_variance)
    cdf_upper = _normal_cdf((x - mean + half_level) * inv_std)
    cdf_lower = _normal_cdf((x - mean - half_level) * inv_std)
    mass = jnp.where(x < -0.999, cdf_upper, jnp.where(x > 0.999, 1 - cdf_lower, cdf_upper - cdf_lower))
    return jnp.log(jnp.maximum(mass, 1e-12))


def _normal_cdf(x: jax.Array) -> jax.Array:
    """Standard normal CDF by the tanh approximation that IF's variance heads were trained with."""
    return 0.5 * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _mean_flat(x: jax.Array) -> jax.Array:
    return jnp.mean(x, axis=(1, 2, 3))
