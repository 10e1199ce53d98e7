"""Stage II of the demo cascade: 64 → 256 px super-resolution on random 64 px crops.

    if-jax train --config configs/demo_sr.py --workdir runs/demo_II --config.text_encoder_from=CASCADE/stage_I

The text encoder is stage I's, frozen; the run remembers its hash, and a cascade refuses a stage trained with another.

Crops alone leave blotches in whole pictures, whose norms find other statistics. So a leg of whole pictures follows.
These are the forms of this recipe; `launch/demo.sh WORKDIR` runs them after those of `demo_base.py`:

    if-jax train --config configs/demo_sr.py:crops --workdir runs/crops
    if-jax export runs/crops stages/crops
    if-jax train --config configs/demo_sr.py:whole --workdir runs/whole

`whole` starts from what `crops` has published. `encoders/demo` is the encoder of `demo_base.py`'s forms.
"""

import ml_collections

from if_jax.recipes import default_recipe, in_form

SETTINGS = {
    "stage": "super-resolution",
    "unet": "demo-II",
    "text_encoder_from": "if_jax/demo/stage_I",
    "prediction": "v",
    "sample_max_value": 1.0,
    "batch_size": 32,
    "steps": 10_000,
    "ema_decays": (0.999,),
    "data.source": "scenes",
    "data.size": 256,
    "data.low_size": 64,
    "data.crop": 64,
    "optimizer.learning_rate": 1e-3,
    "optimizer.final_learning_rate": 1e-5,
    "optimizer.warmup_steps": 300,
    "checkpoint_every": 500,
    "sample.every": 500,
    "sample.steps": "10",
    "sample.guidance_scale": 1.0,
}
LEG = {"text_encoder_from": "encoders/demo", "data.source": "0.5*pairs + 0.5*tasks"}
FORMS = {
    "crops": {**LEG, "data.crop": 128, "batch_size": 16, "steps": 6_000, "optimizer.learning_rate": 1.2e-3},
    "whole": {
        **LEG,
        "data.crop": 0,
        "batch_size": 4,
        "steps": 4_000,
        "optimizer.learning_rate": 4e-4,
        "init_from": "stages/crops",
    },
}


def get_config(form: str = "") -> ml_collections.ConfigDict:
    return in_form(default_recipe(SETTINGS), form, FORMS)
