"""III-L: 256 → 1024 px super-resolution, 0.69 B parameters. IF's own was never released: this net is ours.

    TRAIN=(--config configs/if_III_L.py --workdir gs://BUCKET/runs/III_L)  in launch/tpu_vm/settings.sh

Published: batch 3072, 1.25 M steps, AdamW, 10 % of captions dropped. Ours: everything else, among it 256 px crops
(`:full_frame` is the phase that follows, started with init_from).

Mesh by TPU (mesh.data × mesh.fsdp, accumulate), from the bytes of the state (tools/state_bytes.py), T5-XXL included,
with batch ÷ chips ÷ accumulate pictures a chip at a time; not yet run on one:

| | v4 (32 GB) | v5e (16 GB) | v5p (95 GB) | v6e (32 GB) |
| --- | --- | --- | --- | --- |
| 64 chips | 8 × 8, 24 | 8 × 8, 48 | 16 × 4, 12 | 8 × 8, 24 |
| 256 chips | 32 × 8, 6 | 32 × 8, 12 | 64 × 4, 3 | 32 × 8, 6 |

A quick look at the same code on any machine: `--config configs/if_III_L.py:smoke`.
"""

import ml_collections

from if_jax.recipes import if_recipe

SETTINGS = {
    "unet": "IF-III-L",
    "batch_size": 3072,
    "accumulate": 6,
    "steps": 1_250_000,
    "data.size": 1024,
    "data.low_size": 256,
    "data.crop": 256,
    "sample.steps": "super40",
    "mesh.fsdp": 8,
}


def get_config(form: str = "") -> ml_collections.ConfigDict:
    return if_recipe("super-resolution", SETTINGS, form)
