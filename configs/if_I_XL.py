"""IF-I-XL: the 64 px base stage of 4.3 B parameters.

    TRAIN=(--config configs/if_I_XL.py --workdir gs://BUCKET/runs/I_XL)  in launch/tpu_vm/settings.sh

Published: batch 3072, 2.42 M steps, learning rates, AdamW, 10 % of captions dropped. Ours: everything else.

Mesh by TPU (mesh.data × mesh.fsdp, accumulate), from the bytes of the state (tools/state_bytes.py), T5-XXL included,
with batch ÷ chips ÷ accumulate pictures a chip at a time; not yet run on one:

| | v4 (32 GB) | v5e (16 GB) | v5p (95 GB) | v6e (32 GB) |
| --- | --- | --- | --- | --- |
| 64 chips | 1 × 64, 4 | 1 × 64, 6 | 4 × 16, 4 | 1 × 64, 4 |
| 256 chips | 4 × 64, 1 | 4 × 64, 1 | 16 × 16, 1 | 4 × 64, 1 |

A quick look at the same code on any machine: `--config configs/if_I_XL.py:smoke`. The same with widths that fill a
TPU's matrix unit, which IF's own weights do not fit: `--config configs/if_I_XL.py:tpu`.
"""

import ml_collections

from if_jax.recipes import if_recipe

SETTINGS = {
    "unet": "IF-I-XL",
    "batch_size": 3072,
    "steps": 2_420_000,
    "remat": "blocks",
    "optimizer.initial_learning_rate": 2e-6,
    "optimizer.learning_rate": 5e-5,
    "optimizer.final_learning_rate": 5e-9,
    "mesh.fsdp": 64,
}


def get_config(form: str = "") -> ml_collections.ConfigDict:
    return if_recipe("base", SETTINGS, form, tpu_unet="IF-I-XL-tpu")
