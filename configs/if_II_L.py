"""IF-II-L: 64 → 256 px super-resolution, 1.2 B parameters.

    launch/tpu_vm.sh train POD -- --config configs/if_II_L.py --workdir gs://BUCKET/runs/II_L

Published: batch 1536, 2.5 M steps, AdamW, 10 % of captions dropped. Ours: everything else, among it 64 px crops
(`:full_frame` is the phase that follows, started with init_from).

Mesh by TPU (mesh.data × mesh.fsdp, accumulate), from the bytes of the state (docs/state_bytes.py), T5-XXL included,
and 8 to 16 pictures a chip at a time; not yet run on one:

| | v4 (32 GB) | v5e (16 GB) | v5p (95 GB) | v6e (32 GB) |
| --- | --- | --- | --- | --- |
| 64 chips | 8 × 8, 2 | 4 × 16, 3 | 16 × 4, 2 | 8 × 8, 2 |
| 256 chips | 32 × 8, 1 | 16 × 16, 1 | 64 × 4, 1 | 32 × 8, 1 |

A quick look at the same code on any machine: `--config configs/if_II_L.py:smoke`.
"""

import ml_collections

from if_jax.config import default_recipe, smoke


def get_config(form: str = "") -> ml_collections.ConfigDict:
    config = default_recipe()
    config.stage = "super-resolution"
    config.unet = "IF-II-L"
    config.text_encoder_from = "t5-v1_1-xxl"  # the folder as published, see README "T5 alone"
    config.batch_size = 1536
    config.accumulate = 1
    config.steps = 2_500_000
    config.compute_dtype = "bfloat16"
    config.remat = "none"
    config.ema_decays = (0.9999, 0.999)
    config.sample_max_value = 1.0
    config.data.size = 256
    config.data.low_size = 64
    config.data.crop = 64
    config.sample.steps = "smart50"
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
        config.accumulate = 32
        config.steps = 100_000
        config.optimizer.learning_rate = 1e-5
    return smoke(config) if form == "smoke" else config
