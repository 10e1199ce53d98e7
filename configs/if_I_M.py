"""IF-I-M: the 64 px base stage of 0.37 B parameters.

    TRAIN=(--config configs/if_I_M.py --workdir gs://BUCKET/runs/I_M)  in launch/tpu_vm/settings.sh

Published: batch 3072, 2.5 M steps, AdamW, 10 % of captions dropped. Ours: everything else, the learning rates are
those of IF-I-L.

Mesh by TPU (mesh.data × mesh.fsdp, accumulate), from the bytes of the state (tools/state_bytes.py), T5-XXL included,
with batch ÷ chips ÷ accumulate pictures a chip at a time; not yet run on one:

| | v4 (32 GB) | v5e (16 GB) | v5p (95 GB) | v6e (32 GB) |
| --- | --- | --- | --- | --- |
| 64 chips | 8 × 8, 4 | 8 × 8, 4 | 16 × 4, 4 | 8 × 8, 4 |
| 256 chips | 32 × 8, 1 | 32 × 8, 1 | 64 × 4, 1 | 32 × 8, 1 |

A quick look at the same code on any machine: `--config configs/if_I_M.py:smoke`. The same with widths that fill a
TPU's matrix unit, which IF's own weights do not fit: `--config configs/if_I_M.py:tpu`.
"""

import ml_collections

from if_jax.recipes import if_recipe

SETTINGS = {
    "unet": "IF-I-M",
    "batch_size": 3072,
    "steps": 2_500_000,
    "mesh.fsdp": 8,
}


def get_config(form: str = "") -> ml_collections.ConfigDict:
    return if_recipe("base", SETTINGS, form, tpu_unet="IF-I-M-tpu")
