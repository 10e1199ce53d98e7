"""A LoRA on one of IF's stages, or on the demo's: a style, an object or a face from a folder of captioned pictures.

    if-jax train --config configs/finetune_lora.py --workdir runs/style --config.data.source=my_pictures
    if-jax export runs/style --lora my_style
    if-jax dream "a lighthouse in my style" --cascade IF --lora my_style:0.8

The recipe as it stands is for IF-I-XL, and these are its forms:

| form | net | starts from |
| --- | --- | --- |
| | IF-I-XL | IF-I-XL-v1.0, with T5-XXL |
| `II` | IF-II-L, 64 px crops | IF-II-L-v1.0, with T5-XXL |
| `demo` | stage I of the demo | the package |
| `demo_II` | stage II of the demo, 64 px crops | the package |

Published (diffusers' DreamBooth scripts for IF): attention alone, batch 4, constant rate, 1200 steps at 2e-5 in stage I
and 2000 at 1e-6 in stage II. Ours: rank 16 in place of 4, IF's whole objective with its learned variance, captions
dropped, EMA; the demo's forms.
"""

import ml_collections

from if_jax.recipes import IF_LATER_SETTINGS, default_recipe, in_form

SETTINGS = {
    "stage": "base",
    "unet": "IF-I-XL",
    "init_from": "IF-I-XL-v1.0",
    "text_encoder_from": "t5-v1_1-xxl",
    "lora.rank": 16,
    "lora.alpha": 16.0,
    "data.source": "my_pictures",
    "batch_size": 4,
    "steps": 1_200,
    "compute_dtype": "bfloat16",
    "remat": "blocks",
    "ema_decays": (0.99,),
    "optimizer.schedule": "constant",
    "optimizer.learning_rate": 2e-5,
    "optimizer.warmup_steps": 0,
    "optimizer.b2": 0.999,
    "optimizer.weight_decay": 0.01,
    "log_every": 10,
    "checkpoint_every": 100,
    "sample.every": 100,
}
STAGE_II = {
    **IF_LATER_SETTINGS,
    "stage": "super-resolution",
    "unet": "IF-II-L",
    "init_from": "IF-II-L-v1.0",
    "steps": 2_000,
    "optimizer.learning_rate": 1e-6,
    "validation.source": "my_pictures",
}
DEMO = {
    "unet": "demo-I",
    "init_from": "if_jax/demo/stage_I",
    "text_encoder_from": "if_jax/demo/stage_I",
    "prediction": "v",
    "noise_size": 512,
    "batch_size": 16,
    "steps": 500,
    "compute_dtype": "float32",
    "remat": "none",
    "lora.rank": 8,
    "lora.alpha": 8.0,
    "optimizer.learning_rate": 2e-3,
}
FORMS = {
    "II": STAGE_II,
    "demo": DEMO,
    "demo_II": {
        **STAGE_II,
        **DEMO,
        "unet": "demo-II",
        "init_from": "if_jax/demo/stage_II",
        "prediction": "x0",
        "bound_weight": 0.0,
        "noise_size": 64,
        "data.max_aug_level": 200,
        "sample.steps": "10",
        "sample.guidance_scale": 1.0,
    },
}


def get_config(form: str = "") -> ml_collections.ConfigDict:
    return in_form(default_recipe(SETTINGS), form, FORMS)
