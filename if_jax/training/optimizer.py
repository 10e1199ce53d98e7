"""The optimizer and its learning-rate schedule, built from a recipe with optax."""

from __future__ import annotations

import jax
import optax
from jax.typing import ArrayLike

from if_jax.config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate by the number of updates made: from the initial one over the peak to the final one.

    cosine: linear warm-up, cosine decay. one-cycle: half a cosine up, half a cosine down (Smith & Topin 2017,
    arXiv:1708.07120; the form IF was trained with). constant: linear warm-up, then the peak.

    Args:
      config: the recipe's optimizer.
      steps: of the whole run.
    """
    c, warmup = config, min(config.warmup_steps, max(steps - 1, 0))
    down = optax.schedules.cosine_decay_schedule(1.0, max(steps - warmup, 1))

    def decay(step: ArrayLike) -> ArrayLike:
        if c.schedule == "constant":
            return down(step) * 0 + c.learning_rate
        return c.final_learning_rate + (c.learning_rate - c.final_learning_rate) * down(step)

    def warm(step: ArrayLike) -> ArrayLike:
        share = 1 - optax.schedules.cosine_decay_schedule(1.0, max(warmup, 1))(step)
        if c.schedule != "one-cycle":
            share = optax.schedules.linear_schedule(0.0, 1.0, max(warmup, 1))(step)
        return c.initial_learning_rate + (c.learning_rate - c.initial_learning_rate) * share

    return optax.join_schedules([warm, decay], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The recipe's optimizer; weight decay acts on matrices and kernels only, never on biases and scales.

    Args:
      config: of the recipe.
      steps: of the whole run, for the learning rate.
    """
    rate = learning_rate_schedule(config, steps)
    shared = {"weight_decay": config.weight_decay, "mask": _decayed}
    if config.name == "adafactor":
        # T5X's settings: no momentum, moments of matrices as rows and columns, the rate as given. The rate comes last,
        # so that it scales the weight decay as AdamW's does; optax.adafactor would take that off whole at every step.
        scaled = optax.adafactor(
            None,
            multiply_by_parameter_scale=False,
            weight_decay_rate=config.weight_decay or None,
            weight_decay_mask=_decayed,
        )
        made = optax.chain(scaled, optax.scale_by_schedule(rate))
    elif config.name == "muon":
        made = optax.contrib.muon(
            rate,
            adam_b1=config.b1,
            adam_b2=config.b2,
            weight_decay=config.weight_decay,
            weight_decay_mask=_decayed,
            mu_dtype=config.moment_dtype,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=0.2,  # so that one learning rate serves Muon's part and AdamW's (arXiv:2502.16982)
        )
    else:
        made = optax.adamw(rate, b1=config.b1, b2=config.b2, mu_dtype=config.moment_dtype, **shared)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), made)


def _decayed(params: optax.Params) -> optax.Params:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _matrices(params: optax.Params) -> optax.Params:
    """Which weights Muon treats as matrices, and how: kernels, a convolution's as (taps × in, out); no tables."""

    def shape_of(path: tuple, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        names = [part.key for part in path if isinstance(part, jax.tree_util.DictKey)]  # a boxed leaf ends in .value
        if names[-1] != "kernel" or leaf.ndim < 2:
            return None
        last = leaf.ndim - 1
        return optax.contrib.MuonDimensionNumbers(reduction_axis=tuple(range(last)), output_axis=(last,))

    return jax.tree_util.tree_map_with_path(shape_of, params)
