"""The training state and the pure step that advances it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from if_jax.checkpoints.weights import Params
from if_jax.config import GuardConfig
from if_jax.diffusion.power_average import exponent
from if_jax.training import randomness

Batch = Mapping[str, jax.Array]
LossFn = Callable[[Params, Params, Batch, Batch], tuple[jax.Array, dict]]
DrawFn = Callable[[jax.Array], Batch]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guard:
    """What the step remembers to tell a usual gradient from a spike, and what it has left out so far."""

    norm: jax.Array  # float32 scalar: running average of the gradient norm over accepted steps
    accepted: jax.Array  # int32 scalar: updates made
    skipped: jax.Array  # int32 scalar: updates left out
    in_a_row: jax.Array  # int32 scalar: updates left out since the last one made


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run must keep: arrays only, float32 but for the counters."""

    step: jax.Array  # int32 scalar: batches consumed so far, which is also the data position
    params: Params
    ema: dict[str, Params]  # by decay, see `ema_name`, or length, see `length_name`
    opt_state: Any
    guard: Guard


def ema_name(decay: float) -> str:
    """The key of an average in the state: "0.9999"."""
    return f"{decay:g}"


def length_name(length: float) -> str:
    """The key of a power-function average in the state: "length-0.05"."""
    return f"length-{length:g}"


def init_state(
    params: Params, optimizer: optax.GradientTransformation, decays: Sequence[float], lengths: Sequence[float] = ()
) -> TrainState:
    """Step 0; every EMA starts as a copy of the parameters.

    Args:
      params: to start with.
      optimizer: whose state is begun.
      decays: of the averages that are kept.
      lengths: of the power-function averages that are kept besides.
    """
    zero = jnp.zeros((), jnp.int32)
    averages = [*map(ema_name, decays), *map(length_name, lengths)]
    ema = {name: jax.tree.map(jnp.copy, params) for name in averages}
    guard = Guard(jnp.zeros((), jnp.float32), zero, jnp.copy(zero), jnp.copy(zero))
    return TrainState(jnp.copy(zero), params, ema, optimizer.init(params), guard)


def make_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    decays: Sequence[float],
    seed: int,
    guard: GuardConfig | None = None,
    accumulate: int = 1,
    draw: DrawFn = lambda key: {},
    shard: Callable[[Batch], Batch] = lambda batch: batch,
    lengths: Sequence[float] = (),
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, dict]]:
    """Makes the function that advances the training state by one batch.

    All randomness comes from (seed, state.step), so a resumed run repeats the one that was cut off. It is drawn for the
    whole batch before that is computed in parts, so their number changes nothing but rounding. An EMA decay rises
    as (1 + n) / (10 + n) to its value, so that early averages are not dominated by the initial weights.

    Args:
      loss_fn: (params, frozen, batch, drawn) -> (loss, metrics), all scalars or small vectors.
      optimizer: turns gradients into updates.
      decays: of the averages that are kept.
      seed: of timesteps and noise.
      guard: which updates are left out; what it rejects changes nothing but the counters.
      accumulate: equal parts a batch is computed in, one after another; their gradients are averaged.
      draw: key -> what the loss needs at random, arrays of one row for each row of the batch.
      shard: constrains a part of a batch to its place on the mesh.
      lengths: of the power-function averages that are kept, see `power_average`.

    Returns:
      The pure `step(state, frozen, batch) -> (state, metrics)`.
    """
    guard = guard or GuardConfig()
    grad_fn = jax.grad(loss_fn, has_aux=True)

    def gradients(params: Params, frozen: Params, batch: Batch, drawn: Batch) -> tuple[Params, dict]:
        if accumulate == 1:
            return grad_fn(params, frozen, batch, drawn)
        # Part i takes every accumulate-th row: the parts are then spread over the devices as the batch is.
        parts = jax.tree.map(
            lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), (dict(batch), dict(drawn))
        )

        def body(total: Any, part: tuple[Batch, Batch]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, grad_fn(params, frozen, *map(shard, part))), None

        first = jax.eval_shape(grad_fn, params, frozen, *jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
        total, _ = jax.lax.scan(body, zeros, parts)
        return jax.tree.map(lambda x: x / accumulate, total)

    def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, dict]:
        drawn = shard(draw(randomness.step_key(seed, state.step)))
        grads, metrics = gradients(state.params, frozen, batch, drawn)
        norm = optax.tree.norm(grads)
        good = _is_usual(state.guard, guard, norm, metrics["loss"])

        def update(kept: tuple) -> tuple:
            params, ema, opt_state = kept
            updates, opt_state = optimizer.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            n = state.guard.accepted.astype(jnp.float32)
            rates = {ema_name(decay): 1.0 - jnp.minimum(decay, (1.0 + n) / (10.0 + n)) for decay in decays}
            # 1 − (1 − 1/t)^(γ+1), of which little is left in float32 where t is large, had it been written so
            rates |= {
                length_name(length): -jnp.expm1((exponent(length) + 1) * jnp.log1p(-1.0 / (n + 1.0)))
                for length in lengths
            }
            averages = {
                name: jax.tree.map(lambda e, p, r=rate: e + r * (p - e), ema[name], params)
                for name, rate in rates.items()
            }
            return params, averages, opt_state

        # A branch rather than a choice leaf by leaf: a rejected update is not computed, and the step compiles faster.
        kept = (state.params, state.ema, state.opt_state)
        params, ema, opt_state = jax.lax.cond(good, update, lambda kept: kept, kept)
        counted = _count(state.guard, good, norm)
        metrics |= {"grad_norm": norm, "param_norm": optax.tree.norm(params)}
        metrics |= {"skipped": counted.skipped, "skipped_in_a_row": counted.in_a_row}
        return TrainState(state.step + 1, params, ema, opt_state, counted), metrics

    return step


def _is_usual(seen: Guard, config: GuardConfig, norm: jax.Array, loss: jax.Array) -> jax.Array:
    """Whether an update is made: loss and gradient are finite, and the gradient is no spike."""
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    if not config.spike_factor:
        return finite
    early = seen.accepted < config.grace_steps
    return finite & (early | (norm <= config.spike_factor * seen.norm))


def _count(seen: Guard, good: jax.Array, norm: jax.Array) -> Guard:
    rate = jnp.maximum(0.01, 1.0 / (1.0 + seen.accepted))  # a plain mean at first
    left_out = (~good).astype(jnp.int32)
    return Guard(
        norm=jnp.where(good, seen.norm + rate * (norm - seen.norm), seen.norm),
        accepted=seen.accepted + good.astype(jnp.int32),
        skipped=seen.skipped + left_out,
        in_a_row=jnp.where(good, 0, seen.in_a_row + 1),
    )
