"""IF-I-M: the 64 px base stage of 0.37 B parameters.

    launch/tpu_vm.sh train POD -- --config configs/if_I_M.py --workdir gs://BUCKET/runs/I_M

Published: batch 3072, 2.5 M steps, AdamW, 10 % of captions dropped. Ours: everything else, the learning rates are
those of IF-I-L.

Mesh by TPU (mesh.data × mesh.fsdp, accumulate), from the bytes of the state (docs/state_bytes.py), T5-XXL included,
and 8 to 16 pictures a chip at a time; not yet run on one:

| | v4 (32 GB) | v5e (16 GB) | v5p (95 GB) | v6e (32 GB) |
| --- | --- | --- | --- | --- |
| 64 chips | 8 × 8, 4 | 8 × 8, 4 | 16 × 4, 4 | 8 × 8, 4 |
| 256 chips | 32 × 8, 1 | 32 × 8, 1 | 64 × 4, 1 | 32 × 8, 1 |

A quick look at the same code on any machine: `--config configs/if_I_M.py:smoke`.
"""

import ml_collections

from if_jax.config import default_recipe, smoke


def get_config(form: str = "") -> ml_collections.ConfigDict:
    config = default_recipe()
    config.stage = "base"
    config.unet = "IF-I-M"
    config.text_encoder_from = "t5-v1_1-xxl"  # the folder as published, see README "T5 alone"
    config.batch_size = 3072
    config.accumulate = 1
    config.steps = 2_500_000
    config.compute_dtype = "bfloat16"
    config.remat = "none"
    config.ema_decays = (0.9999, 0.999)
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
    return smoke(config) if form == "smoke" else config
