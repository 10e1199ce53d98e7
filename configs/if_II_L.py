"""IF-II-L: 64 → 256 px super-resolution, 1.2 B parameters.

    TRAIN=(--config configs/if_II_L.py --workdir gs://BUCKET/runs/II_L)  in launch/tpu_vm/settings.sh

Published: batch 1536, 2.5 M steps, AdamW, 10 % of captions dropped. Ours: everything else, among it 64 px crops
(`:full_frame` is the phase that follows, started with init_from).

Mesh by TPU (mesh.data × mesh.fsdp, accumulate), from the bytes of the state (tools/state_bytes.py), T5-XXL included,
with batch ÷ chips ÷ accumulate pictures a chip at a time; not yet run on one:

| | v4 (32 GB) | v5e (16 GB) | v5p (95 GB) | v6e (32 GB) |
| --- | --- | --- | --- | --- |
| 64 chips | 8 × 8, 2 | 4 × 16, 3 | 16 × 4, 2 | 8 × 8, 2 |
| 256 chips | 32 × 8, 1 | 16 × 16, 1 | 64 × 4, 1 | 32 × 8, 1 |

A quick look at the same code on any machine: `--config configs/if_II_L.py:smoke`. The same with widths that fill a
TPU's matrix unit, which IF's own weights do not fit: `--config configs/if_II_L.py:tpu`.
"""

import ml_collections

from if_jax.recipes import if_recipe

SETTINGS = {
    "unet": "IF-II-L",
    "batch_size": 1536,
    "steps": 2_500_000,
    "mesh.fsdp": 8,
}


def get_config(form: str = "") -> ml_collections.ConfigDict:
    return if_recipe("super-resolution", SETTINGS, form, tpu_unet="IF-II-L-tpu")
