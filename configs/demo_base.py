"""Stage I of the demo cascade: a byte-level T5 and a 64 px UNet, trained together on drawn scenes.

    if-jax train --config configs/demo_base.py --workdir runs/demo_I

The same code as IF-I-XL in every part, only narrow. It predicts v instead of ε, which learns the composition in far
fewer pictures; stock diffusers reads that from the released scheduler configuration.
"""

import ml_collections

from if_jax.recipes import default_recipe, in_form


def get_config(form: str = "") -> ml_collections.ConfigDict:
    config = default_recipe()
    config.stage = "base"
    config.unet = "demo-I"
    config.text_encoder = "demo"
    config.prediction = "v"
    config.batch_size = 32
    config.steps = 20_000
    config.ema_decays = (0.999,)
    config.data.source = "scenes"
    config.data.size = 64
    config.optimizer.learning_rate = 1e-3
    config.optimizer.final_learning_rate = 1e-5
    config.optimizer.warmup_steps = 300
    config.checkpoint_every = 500
    config.sample.every = 500
    return in_form(config, form)
