"""A student of the demo's stage I that draws in 4 network calls, without guidance, what that draws in 54 with it.

    if-jax train --config configs/distill_demo.py --workdir runs/fast_I
    if-jax export runs/fast_I if_jax/demo/stage_II cascades/demo-fast --dtype float16

`launch/demo_fast.sh WORKDIR` runs both and scores the result. What the methods are stands in docs/distill.md. Forms:

| form | student of | method |
| --- | --- | --- |
| | stage I of the demo, at guidance 2 | progressive: 4 jumps, each taught by two of the teacher |
| `consistency` | the same | consistency: 4 segments of 25 points |
| `halved` | its own release, `cascades/demo-fast` | progressive: 2 jumps in place of 4 |
| `sr` | stage II of the demo | progressive: one jump in place of two, on 128 px crops |
| `XL` | IF-I-XL | progressive, from a teacher that was trained on to predict v |

A teacher must predict v or x0: where x_t is almost noise, ε says nothing of the picture, and a student must draw it
from there. So IF's own weights are trained on first:

    if-jax train --config configs/if_I_XL.py --config.init_from=IF-I-XL-v1.0 --config.init_only=. \\
      --config.prediction=v --workdir runs/XL_v
"""

import ml_collections

from if_jax.recipes import IF_SETTINGS, default_recipe, in_form

SETTINGS = {
    "stage": "base",
    "unet": "demo-I",
    "text_encoder_from": "if_jax/demo/stage_I",
    "prediction": "v",
    "noise_size": 512,
    "bound_weight": 0.0,
    "distill.method": "progressive",
    "distill.teacher": "if_jax/demo/stage_I",
    "distill.guidance_scale": 2.0,
    "distill.steps": 4,
    "distill.substeps": 2,
    "batch_size": 8,
    "steps": 400,
    "ema_decays": (0.97,),
    "data.source": "0.5*pairs + 0.2*scenes + 0.3*tasks",
    "data.caption_dropout": 0.0,
    "optimizer.learning_rate": 3e-4,
    "optimizer.final_learning_rate": 1e-5,
    "optimizer.warmup_steps": 20,
    "log_every": 10,
    "checkpoint_every": 20,
    "sample.every": 100,
}
LATER = {
    "stage": "super-resolution",
    "unet": "demo-II",
    "prediction": "x0",
    "noise_size": 64,
    "sample_max_value": 1.0,
    "distill.teacher": "if_jax/demo/stage_II",
    "distill.guidance_scale": 1.0,
    "distill.steps": 1,
    "data.source": "0.5*pairs + 0.5*tasks",
    "data.size": 256,
    "data.low_size": 64,
    "data.crop": 128,
    "data.max_aug_level": 200,
    "sample.aug_level": 40,
}
XL = {
    **IF_SETTINGS,
    "unet": "IF-I-XL",
    "noise_size": 64,
    "remat": "blocks",
    "distill.teacher": "cascades/XL_v/stage_I",
    "distill.guidance_scale": 7.0,
    "distill.substeps": 5,
    "batch_size": 1024,
    "accumulate": 4,
    "steps": 50_000,
    "data.source": "my_pictures",
    "optimizer.schedule": "cosine",
    "optimizer.learning_rate": 3e-5,
    "optimizer.final_learning_rate": 1e-6,
    "optimizer.warmup_steps": 500,
    "mesh.fsdp": 64,
    "validation.every": 0,
    "log_every": 50,
    "checkpoint_every": 1_000,
    "sample.every": 1_000,
}
FORMS = {
    "consistency": {"distill.method": "consistency", "distill.substeps": 25},
    "halved": {
        "distill.teacher": "cascades/demo-fast/stage_I",
        "distill.guidance_scale": 1.0,
        "distill.steps": 2,
    },
    "sr": LATER,
    "XL": XL,
}


def get_config(form: str = "") -> ml_collections.ConfigDict:
    return in_form(default_recipe(SETTINGS), form, FORMS)
