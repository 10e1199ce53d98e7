"""IF-I-L: the 64 px base stage of 0.94 B parameters.

    TRAIN=(--config configs/if_I_L.py --workdir gs://BUCKET/runs/I_L)  in launch/tpu_vm/settings.sh

Published: batch 3200, 2.5 M + 0.5 M (these are the first) steps, learning rates, AdamW, 10 % of captions dropped.
Ours: everything else.

Mesh by TPU (mesh.data × mesh.fsdp, accumulate), from the bytes of the state (tools/state_bytes.py), T5-XXL included,
with batch ÷ chips ÷ accumulate pictures a chip at a time; not yet run on one:

| | v4 (32 GB) | v5e (16 GB) | v5p (95 GB) | v6e (32 GB) |
| --- | --- | --- | --- | --- |
| 64 chips | 8 × 8, 5 | 4 × 16, 5 | 16 × 4, 5 | 8 × 8, 5 |
| 128 chips (3200 does not divide by 256) | 16 × 8, 1 | 8 × 16, 5 | 32 × 4, 1 | 16 × 8, 1 |

A quick look at the same code on any machine: `--config configs/if_I_L.py:smoke`. The same with widths that fill a
TPU's matrix unit, which IF's own weights do not fit: `--config configs/if_I_L.py:tpu`.
"""

import ml_collections

from if_jax.recipes import if_recipe

SETTINGS = {
    "unet": "IF-I-L",
    "batch_size": 3200,
    "steps": 2_500_000,
    "mesh.fsdp": 8,
}


def get_config(form: str = "") -> ml_collections.ConfigDict:
    return if_recipe("base", SETTINGS, form, tpu_unet="IF-I-L-tpu")
