"""Stage II of the demo cascade: 64 → 256 px super-resolution on random 64 px crops.

    if-jax train --config configs/demo_sr.py --workdir runs/demo_II --config.text_encoder_from=CASCADE/stage_I

The text encoder is stage I's, frozen; the run remembers its hash, and a cascade refuses a stage trained with another.

It predicts the picture itself (x0) and starts as a copy of its low-resolution input (`init_copy`), so that it learns
only what that lacks. A net that predicted v and started at random was below bicubic after six times the crops. The
low-resolution input is noised to level 200 at most: a small net spends itself on pictures that nobody asks it for. The
variance is fixed: the gradient of the bound that teaches it would drown that of a squared error of a thousandth.

`crops` is the leg of the demo, and `more` goes on with what it has published; `launch/demo.sh WORKDIR` runs them after
those of `demo_base.py`:

    if-jax train --config configs/demo_sr.py:crops --workdir runs/crops
    if-jax export runs/crops stages/crops
    if-jax train --config configs/demo_sr.py:more --workdir runs/more

`encoders/demo` is the encoder of `demo_base.py`'s forms.
"""

import ml_collections

from if_jax.recipes import default_recipe, in_form

SETTINGS = {
    "stage": "super-resolution",
    "unet": "demo-II",
    "text_encoder_from": "if_jax/demo/stage_I",
    "prediction": "x0",
    "init_copy": True,
    "bound_weight": 0.0,
    "sample_max_value": 1.0,
    "batch_size": 32,
    "steps": 10_000,
    "ema_decays": (0.999,),
    "data.source": "scenes",
    "data.size": 256,
    "data.low_size": 64,
    "data.crop": 64,
    "data.max_aug_level": 200,
    "optimizer.learning_rate": 1e-3,
    "optimizer.final_learning_rate": 1e-5,
    "optimizer.warmup_steps": 300,
    "checkpoint_every": 500,
    "sample.every": 500,
    "sample.steps": "4",
    "sample.aug_level": 40,
    "sample.guidance_scale": 1.0,
}
LEG = {
    "text_encoder_from": "encoders/demo",
    "data.source": "0.5*pairs + 0.5*tasks",
    "data.crop": 128,
    "batch_size": 6,
    "ema_decays": (0.99,),
    "optimizer.warmup_steps": 20,
}
FORMS = {
    "crops": {**LEG, "steps": 1_200, "optimizer.learning_rate": 1.2e-3},
    "more": {
        **LEG,
        "steps": 260,
        "optimizer.learning_rate": 9e-4,
        "init_copy": False,
        "init_from": "stages/crops",
    },
}


def get_config(form: str = "") -> ml_collections.ConfigDict:
    return in_form(default_recipe(SETTINGS), form, FORMS)
