"""Stage III of the demo cascade: 256 → 1024 px super-resolution on random crops.

    if-jax train --config configs/demo_sr_1024.py --workdir runs/demo_III --config.text_encoder_from=CASCADE/stage_I

A net of the kind of IF-III-L: six levels, nearly all parameters at low resolution, no self-attention. It is trained
as stage II is (`demo_sr.py`): predicts x0, starts as a copy of its low-resolution input, fixed variance. What stage II
draws is clean, so that a noise level of 25 is enough. `fine` is the leg of the demo, the last of
`launch/demo.sh WORKDIR`.
"""

import ml_collections

from if_jax.recipes import default_recipe, in_form

SETTINGS = {
    "stage": "super-resolution",
    "unet": "demo-III",
    "text_encoder_from": "if_jax/demo/stage_I",
    "prediction": "x0",
    "init_copy": True,
    "bound_weight": 0.0,
    "sample_max_value": 1.0,
    "batch_size": 4,
    "steps": 10_000,
    "ema_decays": (0.99,),
    "data.source": "0.5*pairs + 0.5*tasks",
    "data.size": 1024,
    "data.low_size": 256,
    "data.crop": 192,
    "data.max_aug_level": 25,
    "optimizer.learning_rate": 1.2e-3,
    "optimizer.final_learning_rate": 1e-5,
    "optimizer.warmup_steps": 20,
    "checkpoint_every": 50,
    "sample.every": 500,
    "sample.steps": "2",
    "sample.aug_level": 0,
    "sample.guidance_scale": 1.0,
}
FORMS = {"fine": {"text_encoder_from": "encoders/demo", "steps": 1_200}}


def get_config(form: str = "") -> ml_collections.ConfigDict:
    return in_form(default_recipe(SETTINGS), form, FORMS)
