"""Stage II of the demo cascade: 64 → 256 px super-resolution on random 64 px crops.

    if-jax train --config configs/demo_sr.py --workdir runs/demo_II --config.text_encoder_from=CASCADE/stage_I

The text encoder is stage I's, frozen; the run remembers its hash, and a cascade refuses a stage trained with another.

Crops alone leave blotches in whole pictures, whose norms find other statistics. The weights in the package went on with
whole pictures, at half the size first, then as they are drawn:

    if-jax train --config configs/demo_sr.py --workdir runs/half --config.data.crop=0 \\
        --config.init_from=CASCADE/stage_II --config.data.size=128 --config.data.low_size=32 --config.batch_size=4 \\
        --config.steps=400 --config.optimizer.learning_rate=7e-4
    if-jax export runs/half half/stage_II
    if-jax train --config configs/demo_sr.py --workdir runs/whole --config.data.crop=0 \\
        --config.init_from=half/stage_II --config.batch_size=2 --config.steps=330 --config.optimizer.learning_rate=4e-4
"""

import ml_collections

from if_jax.recipes import default_recipe, in_form


def get_config(form: str = "") -> ml_collections.ConfigDict:
    config = default_recipe()
    config.stage = "super-resolution"
    config.unet = "demo-II"
    config.text_encoder_from = "if_jax/demo/stage_I"
    config.prediction = "v"
    config.sample_max_value = 1.0
    config.batch_size = 32
    config.steps = 10_000
    config.ema_decays = (0.999,)
    config.data.source = "scenes"
    config.data.size = 256
    config.data.low_size = 64
    config.data.crop = 64
    config.optimizer.learning_rate = 1e-3
    config.optimizer.final_learning_rate = 1e-5
    config.optimizer.warmup_steps = 300
    config.checkpoint_every = 500
    config.sample.every = 500
    config.sample.steps = "10"
    config.sample.guidance_scale = 1.0
    return in_form(config, form)
