"""DreamBooth: a stage learns one subject by a rare word, from a few pictures, and keeps what it knew of its class.

    if-jax data subject my_dog --prompt "a photo of a sks dog" --class-prompt "a photo of a dog" --cascade IF
    if-jax train --config configs/finetune_dreambooth.py --workdir runs/dog

The recipe as it stands trains all of IF-I-XL, and these are its forms:

| form | trains | starts from |
| --- | --- | --- |
| | all of IF-I-XL | IF-I-XL-v1.0, with T5-XXL |
| `lora` | factors beside IF-I-XL | the same |
| `II` | all of IF-II-L, 64 px crops; its class is drawn with `--stages 2` | IF-II-L-v1.0, with T5-XXL |
| `demo` | factors beside stage I of the demo | the package |

Half of every batch is of the class: a prior-preservation weight of 1. Published (diffusers' scripts for IF): batch 4
and 150 steps at 1e-7 for all of stage I, 1200 at 2e-5 for a LoRA. Ours: IF's whole objective, EMA, no captions dropped,
and all of `II` and `demo`.
"""

import ml_collections

from if_jax.recipes import IF_LATER_SETTINGS, default_recipe, in_form

SETTINGS = {
    "stage": "base",
    "unet": "IF-I-XL",
    "init_from": "IF-I-XL-v1.0",
    "text_encoder_from": "t5-v1_1-xxl",
    "data.source": "0.5*data/subject/instance + 0.5*data/subject/class",
    "data.caption_dropout": 0.0,
    "batch_size": 8,
    "steps": 150,
    "compute_dtype": "bfloat16",
    "remat": "blocks",
    "ema_decays": (0.99,),
    "optimizer.schedule": "constant",
    "optimizer.learning_rate": 1e-7,
    "optimizer.warmup_steps": 0,
    "optimizer.b2": 0.999,
    "optimizer.weight_decay": 0.01,
    "log_every": 10,
    "checkpoint_every": 50,
    "sample.every": 50,
}
LORA = {"lora.rank": 16, "lora.alpha": 16.0, "steps": 1_200, "optimizer.learning_rate": 2e-5}
FORMS = {
    "lora": LORA,
    "II": {
        **IF_LATER_SETTINGS,
        "stage": "super-resolution",
        "unet": "IF-II-L",
        "init_from": "IF-II-L-v1.0",
        "steps": 1_000,
        "validation.source": "data/subject/instance",
    },
    "demo": {
        **LORA,
        "unet": "demo-I",
        "init_from": "if_jax/demo/stage_I",
        "text_encoder_from": "if_jax/demo/stage_I",
        "prediction": "v",
        "noise_size": 512,
        "compute_dtype": "float32",
        "remat": "none",
        "lora.rank": 8,
        "lora.alpha": 8.0,
        "batch_size": 16,
        "steps": 500,
        "optimizer.learning_rate": 2e-3,
    },
}


def get_config(form: str = "") -> ml_collections.ConfigDict:
    return in_form(default_recipe(SETTINGS), form, FORMS)
