"""Share of peak that the TPU compiler expects of the UNets, forward and in training, by kind of operation. No TPU.

    python tests/benchmarks/tpu_cycles.py [--nets IF-I-M …] [--chips v5e v6e] [--work forward train] [--pictures 16]

Each distinct block is compiled for one core, kept as `if-jax plan` keeps them and shared with it, and counts as often
as it runs. Shares are of the reference network's operations. Prints a table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter

from if_jax.models import presets
from if_jax.models.flops import unet_flops
from if_jax.planning.blocks import PassSettings, unet_blocks
from if_jax.planning.compiling import cache_folder, figures_of, libtpu_version
from if_jax.planning.hlo_cycles import KINDS
from if_jax.planning.slices import GENERATIONS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=["IF-I-M"], choices=presets.UNETS, metavar="NET")
    parser.add_argument("--chips", nargs="+", default=["v5e", "v6e"], choices=GENERATIONS)
    parser.add_argument("--work", nargs="+", default=["forward", "train"], choices=("forward", "train"))
    parser.add_argument("--pictures", type=int, default=16, help="on one core")
    parser.add_argument("--side", type=int, default=64, help="of the pictures, pixels")
    args = parser.parse_args()
    rows = [
        measure(net, chip, work, args.pictures, args.side)
        for net in args.nets
        for chip in args.chips
        for work in args.work
    ]
    print(f"{'net':<12}{'chip':<6}{'work':<9}{'M cycles':>9}{'peak':>7}  cycles by kind")
    for row in rows:
        kinds = ", ".join(f"{name} {share:.0%}" for name, share in row["cycles_by_kind"].items())
        print(
            f"{row['net']:<12}{row['chip']:<6}{row['work']:<9}{row['cycles'] / 1e6:>9.1f}{row['share_of_peak']:>7.1%}  "
            f"{kinds}" + "".join(f"; {name} FAILED: {reason}" for name, reason in row["failed"].items())
        )
    print(json.dumps({"libtpu": libtpu_version(), "pictures": args.pictures, "rows": rows}))


def measure(net: str, chip: str, work: str, pictures: int, side: int) -> dict:
    """Cycles and share of peak of one network; blocks that failed are left out of both."""
    generation, config = GENERATIONS[chip], presets.UNETS[net]
    blocks = unet_blocks(config, (side, side), PassSettings(pictures, work, "bfloat16"))

    def progress(block, figures, seconds_left, left) -> None:
        state = figures.get("error") or f"{figures['cycles']} cycles, {figures['seconds']} s"
        print(f"{net} {chip} {work}: {block.label()}: {state}; {left} left, {seconds_left / 60:.0f} min", flush=True)

    figures = figures_of(blocks, generation, cache_folder(), progress)
    kinds: Counter[str] = Counter()
    for block, times in blocks.items():
        for kind, cycles in figures[block].get("by_kind", {}).items():
            kinds[kind] += times * cycles
    total = sum(kinds.values())
    flops = pictures * unet_flops(config, side) * {"forward": 1, "train": 3}[work]
    per_cycle = generation.peak_flops / generation.hertz / generation.compiled_cores
    return {
        "net": net,
        "chip": chip,
        "work": work,
        "cycles": total,
        "share_of_peak": flops / (total * per_cycle),
        "cycles_by_kind": {kind: round(kinds[kind] / total, 4) for kind in KINDS if kinds[kind]},
        "failed": {block.label(): figures[block]["error"] for block in blocks if "error" in figures[block]},
    }


if __name__ == "__main__":
    main()
