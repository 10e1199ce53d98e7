"""III-L: 256 → 1024 px super-resolution, 0.69 B parameters. IF's own was never released: this net is ours.

    launch/tpu_vm.sh train POD -- --config configs/if_III_L.py --workdir gs://BUCKET/runs/III_L

Published: batch 3072, 1.25 M steps, AdamW, 10 % of captions dropped. Ours: everything else, among it 256 px crops
(`:full_frame` is the phase that follows, started with init_from).

Mesh by TPU (mesh.data × mesh.fsdp, accumulate), from the bytes of the state (docs/state_bytes.py), T5-XXL included,
and 8 to 16 pictures a chip at a time; not yet run on one:

| | v4 (32 GB) | v5e (16 GB) | v5p (95 GB) | v6e (32 GB) |
| --- | --- | --- | --- | --- |
| 64 chips | 8 × 8, 24 | 8 × 8, 48 | 16 × 4, 12 | 8 × 8, 24 |
| 256 chips | 32 × 8, 6 | 32 × 8, 12 | 64 × 4, 3 | 32 × 8, 6 |

A quick look at the same code on any machine: `--config configs/if_III_L.py:smoke`.
"""

import ml_collections

from if_jax.config import default_recipe, smoke


def get_config(form: str = "") -> ml_collections.ConfigDict:
    config = default_recipe()
    config.stage = "super-resolution"
    config.unet = "IF-III-L"
    config.text_encoder_from = "t5-v1_1-xxl"  # the folder as published, see README "T5 alone"
    config.batch_size = 3072
    config.accumulate = 6
    config.steps = 1_250_000
    config.compute_dtype = "bfloat16"
    config.remat = "none"
    config.ema_decays = (0.9999, 0.999)
    config.sample_max_value = 1.0
    config.data.size = 1024
    config.data.low_size = 256
    config.data.crop = 256
    config.sample.steps = "super40"
    config.optimizer.schedule = "one-cycle"
    config.optimizer.initial_learning_rate = 4e-6
    config.optimizer.learning_rate = 1e-4
    config.optimizer.final_learning_rate = 1e-8
    config.optimizer.warmup_steps = 10_000
    config.mesh.fsdp = 8
    config.mesh.rules = "fsdp"
    config.validation.every = 5_000
    config.checkpoint_every = 5_000
    config.sample.every = 5_000
    if form == "full_frame":  # crops see other statistics in their norms than whole pictures do
        config.data.crop = 0
        config.accumulate = 64
        config.steps = 100_000
        config.optimizer.learning_rate = 1e-5
    return smoke(config) if form == "smoke" else config
