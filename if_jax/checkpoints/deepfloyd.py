"""The tensors of DeepFloyd's own release, `pytorch_model.bin`, beside the names of diffusers.

Tables only; files are read and written elsewhere. Names of the tensors from `deepfloyd_if` 1.0.1, `model/unet.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from if_jax.models.unet import UNetConfig


@dataclass(frozen=True)
class TensorRow:
    """One tensor of pytorch_model.bin: there one matrix may hold the queries, keys and values of all heads."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]  # the tensors of diffusers it holds: itself, (q, k, v) or (k, v)
    head_dim: int = 0  # several parts: rows of one head in each of them

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape in diffusers, the same for all parts: linear there where the original convolves along tokens."""
        rest = self.shape[1:2] if len(self.shape) == 3 else self.shape[1:]
        return (self.shape[0] // len(self.parts), *rest)


def table(config: UNetConfig) -> list[TensorRow]:
    """Every tensor of the net once, in the order of the original's `state_dict`."""
    c, width, time, text = config, config.block_out_channels[0], config.time_dim, config.encoder_hid_dim
    rows = [*_perceptron("time_embed", "time_embedding", width, time)]
    rows += [*_input_blocks(c), *_middle_block(c), *_output_blocks(c)]
    rows += _layer("out.0", "conv_norm_out", (width,))
    rows += _layer("out.2", "conv_out", (c.out_channels, width, 3, 3))
    rows += _layer("encoder_pooling.0", "add_embedding.norm1", (text,))
    position = "positional_embedding"
    rows.append(TensorRow(f"encoder_pooling.1.{position}", (1, text), (f"add_embedding.pool.{position}",)))
    for name in ("k_proj", "q_proj", "v_proj"):
        rows += _layer(f"encoder_pooling.1.{name}", f"add_embedding.pool.{name}", (text, text))
    rows += _layer("encoder_pooling.2", "add_embedding.proj", (time, text))
    rows += _layer("encoder_pooling.3", "add_embedding.norm2", (time,))
    rows += _layer("encoder_proj", "encoder_hid_proj", (c.cross_attention_dim, text))
    if c.aug_level_embedding:
        rows += _perceptron("aug_proj", "class_embedding", width, time)
    return rows


def split(row: TensorRow, tensor: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors of diffusers in one of the original.

    Args:
      row: says which ones and how.
      tensor: the original's, (out, in) or OIHW.

    Returns:
      Those of diffusers by name, in the same layout.

    Raises:
      ValueError: the tensor is of another shape.
    """
    if tuple(tensor.shape) != row.shape:
        raise ValueError(f"{row.name} has shape {tuple(tensor.shape)}; the configuration says {row.shape}")
    if len(row.parts) == 1:
        return {row.parts[0]: tensor.reshape(row.part_shape)}
    heads = tensor.reshape(-1, len(row.parts), row.head_dim, *row.part_shape[1:])  # head h: its q, its k, its v
    return {part: heads[:, i].reshape(row.part_shape) for i, part in enumerate(row.parts)}


def join(row: TensorRow, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """The original's tensor from those of diffusers: the inverse of `split`, bit for bit.

    Raises:
      ValueError: a tensor is of another shape.
    """
    for part in row.parts:
        if tuple(tensors[part].shape) != row.part_shape:
            raise ValueError(f"{part} has shape {tuple(tensors[part].shape)}; the configuration says {row.part_shape}")
    if len(row.parts) == 1:
        return tensors[row.parts[0]].reshape(row.shape)
    heads = [tensors[part].reshape(-1, row.head_dim, *row.part_shape[1:]) for part in row.parts]
    return np.stack(heads, axis=1).reshape(row.shape)


def _layer(
    name: str, target: str, shape: tuple[int, ...], parts: Sequence[str] = (), head: int = 0
) -> Iterator[TensorRow]:
    """Weight and bias of a layer that is `target`, or the layers `parts` in `target`."""
    layers = [f"{target}.{part}" for part in parts] or [target]
    for leaf, leaf_shape in (("weight", shape), ("bias", shape[:1])):
        targets = tuple(f"{layer}.{leaf}" for layer in layers)
        yield TensorRow(f"{name}.{leaf}", leaf_shape, targets, head if len(targets) > 1 else 0)


def _perceptron(name: str, target: str, width: int, time: int) -> Iterator[TensorRow]:
    yield from _layer(f"{name}.0", f"{target}.linear_1", (time, width))
    yield from _layer(f"{name}.2", f"{target}.linear_2", (time, time))


def _res_block(name: str, target: str, width: int, out: int, time: int) -> Iterator[TensorRow]:
    yield from _layer(f"{name}.in_layers.0", f"{target}.norm1", (width,))
    yield from _layer(f"{name}.in_layers.2", f"{target}.conv1", (out, width, 3, 3))
    yield from _layer(f"{name}.emb_layers.1", f"{target}.time_emb_proj", (2 * out, time))
    yield from _layer(f"{name}.out_layers.0", f"{target}.norm2", (out,))
    yield from _layer(f"{name}.out_layers.3", f"{target}.conv2", (out, out, 3, 3))
    if width != out:
        yield from _layer(f"{name}.skip_connection", f"{target}.conv_shortcut", (out, width, 1, 1))


def _attention(name: str, target: str, width: int, c: UNetConfig) -> Iterator[TensorRow]:
    own = ("to_q",) if c.only_cross_attention else ("to_q", "to_k", "to_v")
    text, head = c.cross_attention_dim, c.attention_head_dim
    yield from _layer(f"{name}.norm", f"{target}.group_norm", (width,))
    yield from _layer(f"{name}.qkv", target, (len(own) * width, width, 1), own, head)
    yield from _layer(f"{name}.encoder_kv", target, (2 * width, text, 1), ("add_k_proj", "add_v_proj"), head)
    yield from _layer(f"{name}.norm_encoder", f"{target}.norm_cross", (text,))
    yield from _layer(f"{name}.proj_out", f"{target}.to_out.0", (width, width, 1))


def _input_blocks(c: UNetConfig) -> Iterator[TensorRow]:
    """Block 0 is the first convolution; each level has one block per layer and, but for the last, one that halves."""
    made, number = c.block_out_channels[0], 0
    yield from _layer("input_blocks.0.0", "conv_in", (made, c.in_channels, 3, 3))
    for level, width in enumerate(c.block_out_channels):
        target = f"down_blocks.{level}"
        for layer in range(c.layers_per_block[level]):
            number += 1
            yield from _res_block(f"input_blocks.{number}.0", f"{target}.resnets.{layer}", made, width, c.time_dim)
            if c.attention_levels[level]:
                yield from _attention(f"input_blocks.{number}.1", f"{target}.attentions.{layer}", width, c)
            made = width
        if level < len(c.block_out_channels) - 1:
            number += 1
            yield from _res_block(f"input_blocks.{number}.0", f"{target}.downsamplers.0", width, width, c.time_dim)


def _middle_block(c: UNetConfig) -> Iterator[TensorRow]:
    width = c.block_out_channels[-1]
    yield from _res_block("middle_block.0", "mid_block.resnets.0", width, width, c.time_dim)
    yield from _attention("middle_block.1", "mid_block.attentions.0", width, c)
    yield from _res_block("middle_block.2", "mid_block.resnets.1", width, width, c.time_dim)


def _output_blocks(c: UNetConfig) -> Iterator[TensorRow]:
    """Each level has one block per skip; the last of them also doubles the size, but for the last level."""
    widths, last, number = c.block_out_channels, len(c.block_out_channels) - 1, 0
    made, skips = widths[-1], [widths[0]]
    for level, width in enumerate(widths):
        skips += [width] * (c.layers_per_block[level] + (level < last))
    for level in reversed(range(last + 1)):
        target, width, layers = f"up_blocks.{last - level}", widths[level], c.layers_per_block[level] + 1
        for layer in range(layers):
            block = f"output_blocks.{number}"
            yield from _res_block(f"{block}.0", f"{target}.resnets.{layer}", made + skips.pop(), width, c.time_dim)
            if c.attention_levels[level]:
                yield from _attention(f"{block}.1", f"{target}.attentions.{layer}", width, c)
            made, number = width, number + 1
        if level > 0:  # third in its block, or second where nothing attends
            block = f"output_blocks.{number - 1}.{1 + c.attention_levels[level]}"
            yield from _res_block(block, f"{target}.upsamplers.0", width, width, c.time_dim)
