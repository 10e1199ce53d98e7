"""How many bytes of a stage's training state lie on each device, by rule set; nothing is allocated.

    python tools/state_bytes.py [--unet IF-I-XL] [--data 4] [--fsdp 64] [--tensor 1] [--text t5-v1_1-xxl] [--lora 16]

Prints one line for each kind of array and rule set, in GB per device: parameters, EMA, optimizer moments, gradients
(alive during a step), the frozen text encoder and, of a LoRA, the frozen UNet in bfloat16.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from jax.sharding import AbstractMesh

from if_jax.config import LoraConfig, MeshConfig, OptimizerConfig, Recipe
from if_jax.models import presets
from if_jax.parallel import rules
from if_jax.parallel.mesh import AXES
from if_jax.training.memory import step_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--unet", default="IF-I-XL", choices=presets.UNETS)
    parser.add_argument("--text", default="t5-v1_1-xxl", choices=presets.T5_ENCODERS)
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "adafactor", "muon"))
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="of a LoRA on attention; 0: the whole net")
    for axis, size in zip(AXES, (4, 64, 1), strict=True):
        parser.add_argument(f"--{axis}", type=int, default=size)
    args = parser.parse_args()
    mesh = AbstractMesh(tuple(getattr(args, axis) for axis in AXES), AXES)
    tables = {name: state_bytes(args.unet, args.text, args.optimizer, mesh, name, args.lora) for name in rules.PRESETS}
    print(f"{args.unet}, {args.optimizer}, {' × '.join(map(str, mesh.axis_sizes))} devices, GB on each")
    print(f"{'':<18}" + "".join(f"{name:>10}" for name in tables))
    for kind in next(iter(tables.values())):
        print(f"{kind:<18}" + "".join(f"{table[kind] / 1e9:>10.2f}" for table in tables.values()))


def state_bytes(unet: str, text: str, name: str, mesh: Any, preset: str, rank: int = 0) -> dict[str, int]:
    """Bytes on one device by kind of array."""
    config, text_config = presets.UNETS[unet], presets.T5_ENCODERS[text]
    stage = "super-resolution" if config.aug_level_embedding else "base"
    recipe = Recipe(
        stage=stage,
        unet=unet,
        text_encoder_from=text,
        compute_dtype="bfloat16",
        optimizer=OptimizerConfig(name=name),
        mesh=MeshConfig(rules=preset),
        lora=LoraConfig(rank=rank),
    )
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, size=config.size_multiple))
    row = step_bytes(recipe, text_config, mesh, activations=False)
    return row | {"sum": sum(row.values())}


if __name__ == "__main__":
    main()
