"""From a block to its program: the network's own modules at the block's shapes, compiled for one core of a TPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from if_jax.models.blocks import BlockSettings, StepEmbedding, TextEmbedding, recomputed_blocks
from if_jax.models.layers import Conv, Dense, GroupNorm, gelu, sinusoid
from if_jax.models.t5 import T5Block, T5Config
from if_jax.planning.blocks import Block
from if_jax.planning.hlo_cycles import read_cycles
from if_jax.planning.slices import Generation


def compile_block(block: Block, generation: Generation) -> dict[str, Any]:
    """Compiles a block's program for one core.

    Args:
      block: which.
      generation: of the chip.

    Returns:
      JSON values: "cycles", "by_kind", "unestimated" (see `Cycles`), "scratch" bytes besides what goes in and comes
      out, and the "seconds" it took.

    Raises:
      jax.errors.JaxRuntimeError: the compiler refuses it, or fails.
    """
    began = time.monotonic()
    device = one_core(generation)
    function, params, inputs = block_program(block)
    place = SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), (params, inputs)
    )
    compiled = jax.jit(function).lower(*arguments).compile()
    cycles = read_cycles(compiled.as_text() or "")
    memory = compiled.memory_analysis()
    return {
        "cycles": cycles.total,
        "by_kind": cycles.by_kind,
        "unestimated": cycles.unestimated,
        "scratch": int(memory.temp_size_in_bytes) if memory else 0,
        "seconds": round(time.monotonic() - began, 1),
    }


def one_core(generation: Generation) -> Any:
    """A core of a chip that is not there, to compile for.

    Raises:
      ValueError: this libtpu does not know the generation.
    """
    ones = (1,) * len(next(iter(generation.shapes.values())))
    name = f"{generation.name}:" + "x".join(map(str, ones))
    try:
        # A single chip has a host of its own only where that is said.
        made = topologies.get_topology_desc(platform="tpu", topology_name=name, chips_per_host_bounds=(1, 1, 1))
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"this libtpu has no topology {name} ({reason}): update libtpu, or plan another slice"
        ) from None
    return made.devices[0]


def block_program(block: Block) -> tuple[Callable[..., Any], Any, Any]:
    """The function of a block, as a step of training or drawing runs it.

    Args:
      block: which, and what of it is computed.

    Returns:
      `function(params, inputs)` and the abstract values of both. For gradients, inputs end with those of the outputs.
    """
    module, inputs = _module(block)
    params = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs))
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, _stored(block)), params)
    if block.work == "forward":
        return lambda params, inputs: module.apply(params, *inputs), params, inputs
    outputs = jax.eval_shape(module.apply, params, *inputs)

    def both(params: Any, values: Any) -> Any:
        inputs, gradients = values
        out, pull = _pulled_back(block, module, params, inputs)
        return out, pull(gradients)

    return both, params, (inputs, outputs)


def _pulled_back(block: Block, module: nn.Module, params: Any, inputs: Any) -> tuple[Any, Any]:
    """What a block makes of its inputs, and the pull-back to those in floating point; in training to its parameters."""
    moving = [i for i, leaf in enumerate(inputs) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    def run(params: Any, *passed: jax.Array) -> Any:
        merged = list(inputs)
        for place, value in zip(moving, passed, strict=True):
            merged[place] = value
        return module.apply(params, *merged)

    passed = [inputs[i] for i in moving]
    if block.work == "train":
        return jax.vjp(run, params, *passed)
    return jax.vjp(lambda *passed: run(params, *passed), *passed)


def kept_for_gradients(block: Block) -> list[jax.ShapeDtypeStruct]:
    """The arrays that a block's forward pass keeps for its backward one, as written: the compiler keeps fewer.

    Args:
      block: whose gradients are computed.
    """
    module, inputs = _module(block)
    params = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs))

    def kept(params: Any, inputs: Any) -> Any:
        return _pulled_back(block, module, params, inputs)[1]

    return jax.tree.leaves(jax.eval_shape(kept, params, inputs))


def _stored(block: Block) -> Any:
    """Weights that are trained are float32; those that are only used are in the compute precision."""
    return jnp.float32 if block.work == "train" else jnp.dtype(block.dtype)


def _module(block: Block) -> tuple[nn.Module, list[jax.ShapeDtypeStruct]]:
    dtype, rows = jnp.dtype(block.dtype), block.rows

    def array(*shape: int, of: Any = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), of)

    match block.kind:
        case "residual":
            x = [array(block["height"], block["width"], block["features_in"])]
            if block["skip"]:
                x.append(array(block["height"], block["width"], block["skip"]))
            return _Residual(block), [*x, array(block["time_dim"])]
        case "attention":
            x = array(block["height"], block["width"], block["features"])
            return _Attention(block), [x, array(block["text_length"], block["text_dim"])]
        case "embedding":
            steps = [array(of=jnp.int32)] * (1 + block["aug_level"])
            return _Embedding(block), [array(block["text_length"], block["hid_dim"], of=jnp.float32), *steps]
        case "ends":
            x = array(block["height"], block["width"], block["in_channels"], of=jnp.float32)
            return _Ends(block), [x, array(block["height"], block["width"], block["features"])]
        case "text":
            length, heads = block["length"], block["num_heads"]
            bias = jax.ShapeDtypeStruct((1, heads, length, length), jnp.float32)
            hidden = array(1, 1, length, of=jnp.float32)
            return _Text(block), [array(length, block["d_model"]), bias, hidden]


def _settings(block: Block, **own: Any) -> BlockSettings:
    values = {"head_dim": 64, "num_groups": block["groups"], "eps": 1e-5, "skip_time_act": False}
    values |= {"only_cross_attention": False, "dtype": jnp.dtype(block.dtype), "remat": block.remat}
    return BlockSettings(**values | own)


class _Residual(nn.Module):
    block: Block

    @nn.compact
    def __call__(self, *inputs: jax.Array) -> jax.Array:
        b = self.block
        settings = _settings(b, eps=b["eps"], skip_time_act=b["skip_time_act"])
        *x, emb = inputs
        residual, _ = recomputed_blocks(settings)
        joined = x[0] if len(x) == 1 else jnp.concatenate(x, axis=-1)
        return residual(b["features"], settings, b["out_scale"], b["resample"])(joined, emb)


class _Attention(nn.Module):
    block: Block

    @nn.compact
    def __call__(self, x: jax.Array, text: jax.Array) -> jax.Array:
        b = self.block
        settings = _settings(b, head_dim=b["head_dim"], only_cross_attention=b["only_cross"])
        _, attention = recomputed_blocks(settings)
        return attention(settings)(x, text)


class _Embedding(nn.Module):
    """What `UNet` makes of steps and text before its levels."""

    block: Block

    @nn.compact
    def __call__(self, states: jax.Array, *steps: jax.Array) -> tuple[jax.Array, jax.Array]:
        b, dtype = self.block, jnp.dtype(self.block.dtype)
        emb = TextEmbedding(b["time_dim"], b["heads"], dtype)(states)
        for step in steps:
            emb = emb + StepEmbedding(b["time_dim"], dtype)(sinusoid(step, b["features"]))
        return gelu(emb), Dense(b["text_dim"], dtype=dtype)(states)


class _Ends(nn.Module):
    """The first and the last convolution of `UNet`."""

    block: Block

    @nn.compact
    def __call__(self, x_t: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
        b, dtype = self.block, jnp.dtype(self.block.dtype)
        first = Conv(b["features"], dtype=dtype)(x_t)
        h = gelu(GroupNorm(b["groups"], b["eps"], dtype)(h))
        return first, Conv(b["out_channels"], dtype=dtype)(h).astype(jnp.float32)


class _Text(nn.Module):
    block: Block

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array, hidden: jax.Array) -> jax.Array:
        sizes = dict(self.block.sizes)
        del sizes["length"]
        return T5Block(T5Config(**sizes), jnp.dtype(self.block.dtype))(x, bias, hidden)[0]
