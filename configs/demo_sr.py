"""Stage II of the demo cascade: 64 → 256 px super-resolution on random 64 px crops.

    if-jax train --config configs/demo_sr.py --workdir runs/demo_II --config.text_encoder_from=CASCADE/stage_I

The text encoder is stage I's, frozen; the run remembers its hash, and a cascade refuses a stage trained with another.

Crops alone leave blotches in whole pictures, whose norms find other statistics. The weights in the package went on with
whole pictures, at half the size first, then as they are drawn. These are the forms of this recipe, each of which starts
from what the one before has published; `encoders/demo` is the encoder of `configs/demo_base.py`'s forms.

    if-jax train --config configs/demo_sr.py:crops --workdir runs/crops
    if-jax export runs/crops stages/crops

and the same with `half` and `whole` in place of `crops`.
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
WHOLE = {"text_encoder_from": "encoders/demo", "data.crop": 0}
FORMS = {
    "crops": {"text_encoder_from": "encoders/demo"},
    "half": {
        **WHOLE,
        "data.size": 128,
        "data.low_size": 32,
        "batch_size": 4,
        "steps": 400,
        "optimizer.learning_rate": 7e-4,
        "init_from": "stages/crops",
    },
    "whole": {
        **WHOLE,
        "batch_size": 2,
        "steps": 330,
        "optimizer.learning_rate": 4e-4,
        "init_from": "stages/half",
    },
}


def get_config(form: str = "") -> ml_collections.ConfigDict:
    return in_form(default_recipe(SETTINGS), form, FORMS)
