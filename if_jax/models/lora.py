"""LoRA (Hu et al. 2021, arXiv:2106.09685): a frozen kernel W with two small factors beside it, x W + s (x A) B.

The networks know nothing of it. While one is applied, `apply` listens to its linear layers and convolutions, and adds
the second term where the tree of factors has something at the layer's path. So the gradient of a frozen kernel, the
largest part of a backward pass, is never made. For drawing and for releases `merged_kernel` puts the factors into W.

The tree of factors mirrors that of the parameters: in place of a layer's `kernel` stand `lora_A/kernel` (in, r) and
`lora_B/kernel` (r, out). Beside a convolution A has its taps, (h, w, in, r), and B is 1×1, (1, 1, r, out). These are
the layers of PyTorch's peft, by its names.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.typing import DTypeLike

from if_jax.models import int8
from if_jax.models.layers import UNIFORM_FAN_IN, Conv, Dense, convolve

ModuleTree = Mapping[str, Any]  # parameters or factors, nested by module
LayerPath = tuple[str, ...]  # of a layer in such a tree: ("mid_block", "attentions_0", "to_q")

# Words that stand for several layers: those that diffusers' training scripts adapt, and the convolutions of its blocks.
GROUPS: dict[str, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "to_out"),
    "conv": ("conv1", "conv2", "conv_shortcut"),
}
TEXT_TARGETS = "SelfAttention"  # of a T5: q, k, v and o


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AdaptedParams:
    """A network's frozen parameters with the factors beside some of its kernels."""

    base: ModuleTree
    factors: ModuleTree
    scale: float = dataclasses.field(metadata={"static": True})  # alpha / rank
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})  # share of the inputs of A left out


def target_paths(kernels: Mapping[LayerPath, Any], targets: str) -> list[LayerPath]:
    """The layers that factors go beside.

    Args:
      kernels: of the network, by path of the layer, see `kernels_of`.
      targets: words joined by "+": a group ("attention", "conv"), or the name of layers or of what holds them, such as
        "to_q", "mid_block" or "up_blocks_0/attentions_1".

    Returns:
      Their paths, sorted.

    Raises:
      ValueError: a word matches no layer; says which are near it.
    """
    chosen: set[LayerPath] = set()
    for word in targets.split("+"):
        names = GROUPS.get(word, (word,))
        matches = {path for path in kernels if any(_matches(path, name) for name in names)}
        if not matches:
            known = sorted({*GROUPS, *(_plain(name) for path in kernels for name in path)})
            near = difflib.get_close_matches(word, known, n=3, cutoff=0.5) or known[:3]
            raise ValueError(f"no layer of the net is called {word!r}: near it are {', '.join(near)}")
        chosen |= matches
    return sorted(chosen)


def kernels_of(tree: ModuleTree, path: LayerPath = ()) -> dict[LayerPath, Any]:
    """The kernels of linear layers and convolutions, arrays or what stands for them, by path of the layer."""
    kernels: dict[LayerPath, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            kernels |= kernels_of(value, (*path, name))
        elif name == "kernel":
            kernels[path] = value
    return kernels


def check_rank(kernels: Mapping[LayerPath, Any], paths: Sequence[LayerPath], rank: int) -> None:
    """Refuses a rank at which the factors of a kernel would be no smaller than the kernel.

    Raises:
      ValueError: names the narrowest layer and its width.
    """
    for path in paths:
        *taps, width_in, width_out = kernels[path].shape
        width = min(int(np.prod(taps, dtype=int)) * width_in, width_out)
        if rank > width:
            raise ValueError(f"{'/'.join(path)} is only {width} wide: use a rank of at most {width}, or other targets")


def init_factors(boxed: ModuleTree, targets: str, rank: int, key: jax.Array) -> ModuleTree:
    """Factors that change nothing yet: A is uniform, as IF's own layers start, and B is zero.

    Args:
      boxed: the network's kernels in boxes with their logical axis names, abstract or not.
      targets: see `target_paths`.
      rank: r, columns of A and rows of B.
      key: decides A.

    Returns:
      The tree of factors, float32, boxed with the names of the kernels' own dimensions.

    Raises:
      ValueError: a word of `targets` matches nothing, or the rank is above the width of a layer.
    """
    boxes = kernels_of(boxed)
    kernels = nn.unbox(boxes)
    paths = target_paths(kernels, targets)
    check_rank(kernels, paths, rank)
    factors: dict[LayerPath, Any] = {}
    for path, own in zip(paths, jax.random.split(key, len(paths)), strict=True):
        *taps, width_in, width_out = kernels[path].shape
        name_in, name_out = boxes[path].names[-2:]
        around = (None,) * len(taps)
        down = UNIFORM_FAN_IN(own, (*taps, width_in, rank), jnp.float32)
        up = jnp.zeros((*(1,) * len(taps), rank, width_out), jnp.float32)
        factors[*path, "lora_A", "kernel"] = nn.LogicallyPartitioned(down, (*around, name_in, None))
        factors[*path, "lora_B", "kernel"] = nn.LogicallyPartitioned(up, (*around, None, name_out))
    return unflatten_dict(factors)


def apply(
    module: nn.Module, params: ModuleTree | AdaptedParams, *inputs: jax.Array | None, keys: jax.Array | None = None
) -> jax.Array:
    """What a network makes of its inputs, with factors beside its kernels where it has some; they may be in int8.

    Args:
      module: the network.
      params: its parameters.
      inputs: of its `__call__`, the first dimension of all is B.
      keys: (B,) random keys; where given, each row drops its own share of the inputs of A.
    """
    adapted = params if isinstance(params, AdaptedParams) else AdaptedParams(params, {}, 0.0)
    base, kernels = int8.split(adapted.base)
    if not adapted.factors and not kernels:
        return cast(jax.Array, module.apply({"params": base}, *inputs))
    dropout = adapted.dropout if keys is not None else 0.0

    def beside(call: Callable, arguments: tuple, settings: dict, context: nn.module.InterceptorContext) -> Any:
        layer = context.module
        if not isinstance(layer, Dense | Conv):
            return call(*arguments, **settings)
        quantised = layer.has_variable(int8.COLLECTION, "kernel")
        out = int8.layer_output(layer, arguments[0]) if quantised else call(*arguments, **settings)
        if not layer.has_variable("lora", "lora_A"):
            return out
        x = arguments[0].astype(layer.dtype)
        if dropout:
            x = _drop(x, dropout, keys, layer.path)
        down, up = (layer.get_variable("lora", name)["kernel"].astype(layer.dtype) for name in ("lora_A", "lora_B"))
        product = convolve if down.ndim == 4 else jnp.matmul
        return out + product(product(x, down) * adapted.scale, up)

    variables = {"params": base, "lora": adapted.factors, int8.COLLECTION: kernels}
    with nn.intercept_methods(beside):
        return cast(jax.Array, module.apply(variables, *inputs))


def merged_kernel(kernel: Any, down: Any, up: Any, scale: float) -> Any:
    """W + s A B in float32, of arrays of JAX or NumPy.

    Args:
      kernel: W, (in, out) or (h, w, in, out).
      down: A.
      up: B.
      scale: s.
    """
    return kernel.astype(np.float32) + scale * (down @ up.reshape(up.shape[-2:]))


def merge(params: ModuleTree | AdaptedParams, dtype: DTypeLike = jnp.float32) -> ModuleTree:
    """The parameters with the factors in them: the same function without factors. Other kernels are not copied.

    Args:
      params: of a network.
      dtype: of other kernels that were in int8.
    """
    if not isinstance(params, AdaptedParams):
        return int8.to_float(params, dtype)
    join = jax.jit(merged_kernel, static_argnames="scale")
    joined = merge_where(params.base, params.factors, lambda _, w, a, b: join(w, a, b, scale=params.scale))
    return int8.to_float(joined, dtype)


def merge_where(
    base: ModuleTree, factors: ModuleTree, join: Callable[[LayerPath, Any, Any, Any], Any], path: LayerPath = ()
) -> ModuleTree:
    """A tree of parameters with every kernel that has factors replaced.

    Args:
      base: the parameters.
      factors: the tree of factors.
      join: (path of the layer, W, A, B) -> what takes the place of W.
      path: of the trees in those of the network.
    """
    if "lora_A" in factors:
        joined = join(path, base["kernel"], factors["lora_A"]["kernel"], factors["lora_B"]["kernel"])
        return {**base, "kernel": joined}
    return {**base, **{name: merge_where(base[name], inner, join, (*path, name)) for name, inner in factors.items()}}


def pairs_of(factors: ModuleTree, path: LayerPath = ()) -> Iterator[tuple[LayerPath, Any, Any]]:
    """(path of the layer, A, B) of every layer that has factors."""
    if "lora_A" in factors:
        yield path, factors["lora_A"]["kernel"], factors["lora_B"]["kernel"]
        return
    for name, inner in factors.items():
        yield from pairs_of(inner, (*path, name))


def _drop(x: jax.Array, share: float, keys: jax.Array | None, path: LayerPath) -> jax.Array:
    """x (B, …) with a share of its entries zero and the others larger, drawn for each row and layer by itself."""
    layer = zlib.crc32("/".join(path).encode())
    kept = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, layer), 1 - share, x.shape[1:]))(keys)
    return jnp.where(kept, x / (1 - share), 0)


def _matches(path: LayerPath, name: str) -> bool:
    """Whether a layer is called so, or lies in what is: "to_out" is to_out_0, "attentions_0/to_q" a part of a path."""
    return f"/{name}/" in f"/{'/'.join(path)}/" or any(_plain(part) == name for part in path)


def _plain(name: str) -> str:
    return re.sub(r"_\d+$", "", name)
