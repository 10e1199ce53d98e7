"""The training state and the pure step that advances it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Params = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run must keep: arrays only, float32 but for the step counter."""

    step: jax.Array  # int32 scalar: batches consumed so far, which is also the data position
    params: Params
    ema: Params
    opt_state: Any


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0 from the given parameters; the EMA starts as a copy of them."""
    return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params))


def make_step(
    loss_fn: Callable[..., tuple[jax.Array, dict]],
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    seed: int,
) -> Callable[[TrainState, Params, dict], tuple[TrainState, dict]]:
    """Returns the pure `step(state, frozen, batch) -> (state, metrics)`.

    All randomness comes from (seed, state.step), so a resumed run repeats the one that was cut off. The EMA decay
    rises as (1 + n) / (10 + n) to `ema_decay`, so that early averages are not dominated by the initial weights.
    """

    def step(state: TrainState, frozen: Params, batch: dict) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params, frozen, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        n = state.step.astype(jnp.float32)
        decay = jnp.minimum(ema_decay, (1.0 + n) / (10.0 + n))
        ema = jax.tree.map(lambda old, new: old + (1.0 - decay) * (new - old), state.ema, params)
        metrics |= {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return step
