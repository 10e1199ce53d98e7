"""A cost table in place of the TPU compiler: cycles from each block's own operations, all of one kind."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from if_jax.planning.blocks import Block

_PASSES = {"forward": 1, "inputs": 2, "train": 3}


def block_flops(block: Block) -> int:
    """Operations of a block's forward pass on all its rows: convolutions and matrix products."""
    size = dict(block.sizes)
    pixels = size.get("height", 0) * size.get("width", 0)
    match block.kind:
        case "residual":
            before = size["features_in"] + size["skip"]
            pixels = {"none": pixels, "up": 4 * pixels, "down": pixels // 4}[size["resample"]]
            shortcut = before * size["features"] if before != size["features"] else 0
            adds = pixels * (9 * before * size["features"] + 9 * size["features"] ** 2 + shortcut)
            adds += 2 * size["time_dim"] * size["features"]
        case "attention":
            own, length = (0 if size["only_cross"] else 1), size["text_length"]
            adds = pixels * (2 + 2 * own) * size["features"] ** 2
            adds += 2 * length * size["text_dim"] * size["features"]
            adds += 2 * pixels * (length + own * pixels) * size["features"]
        case "ends":
            adds = 9 * pixels * size["features"] * (size["in_channels"] + size["out_channels"])
        case "embedding":
            hid, time_dim, length = size["hid_dim"], size["time_dim"], size["text_length"]
            adds = (1 + size["aug_level"]) * (size["features"] * time_dim + time_dim**2)
            adds += hid**2 + 2 * (length + 1) * hid**2 + 2 * (length + 1) * hid + hid * time_dim
            adds += length * hid * size["text_dim"]
        case "text":
            inner, length = size["num_heads"] * size["d_kv"], size["length"]
            adds = length * (4 * size["d_model"] * inner + 3 * size["d_model"] * size["d_ff"] + 2 * length * inner)
    return 2 * block.rows * adds


def figures(blocks: Iterable[Block], per_cycle: float = 131072.0) -> dict[Block, dict[str, Any]]:
    """As `figures_of`, at the full rate; blocks that are computed again cost a third more."""
    rows = {}
    for block in blocks:
        again = 4 / 3 if block.remat == "blocks" else 1
        cycles = round(again * _PASSES[block.work] * block_flops(block) / per_cycle)
        rows[block] = {"cycles": cycles, "by_kind": {"convolution": cycles}, "unestimated": {}, "seconds": 1.0}
    return rows
