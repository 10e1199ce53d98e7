"""New words (textual inversion): rows of T5's embedding table learn what a few pictures show; nothing else is trained.

    if-jax train --config configs/finetune_words.py --workdir runs/word --config.data.source=my_pictures
    if-jax export runs/word --new-words my_word
    if-jax dream "a photo of a sks-toy on a beach" --cascade IF --new-words my_word

The captions beside the pictures hold the word, "a photo of a sks-toy", which must be part of no other word. The recipe
as it stands is for IF-I-XL; its form `demo` is for stage I of the demo.

Published (Gal et al. 2022, for latent diffusion): a row for each word, begun as that of a word near it, batch 4, 5000
steps at a constant rate of 5e-3, no weight decay. Ours: T5, IF's whole objective, EMA, and the demo's form.
"""

import ml_collections

from if_jax.recipes import default_recipe, in_form

SETTINGS = {
    "stage": "base",
    "unet": "IF-I-XL",
    "init_from": "IF-I-XL-v1.0",
    "text_encoder_from": "t5-v1_1-xxl",
    "new_words.tokens": ("sks-toy",),
    "new_words.init": "toy",
    "data.source": "my_pictures",
    "data.caption_dropout": 0.0,
    "batch_size": 4,
    "steps": 5_000,
    "compute_dtype": "bfloat16",
    "remat": "blocks",
    "ema_decays": (0.99,),
    "optimizer.schedule": "constant",
    "optimizer.learning_rate": 5e-3,
    "optimizer.warmup_steps": 0,
    "optimizer.b2": 0.999,
    "log_every": 10,
    "checkpoint_every": 100,
    "sample.every": 100,
    "sample.prompts": ("a photo of a sks-toy", "a sks-toy on a beach"),
}
FORMS = {
    "demo": {
        "unet": "demo-I",
        "init_from": "if_jax/demo/stage_I",
        "text_encoder_from": "if_jax/demo/stage_I",
        "prediction": "v",
        "noise_size": 512,
        "new_words.tokens": ("sks-toy",),
        "new_words.init": "",
        "batch_size": 16,
        "steps": 500,
        "compute_dtype": "float32",
        "remat": "none",
        "optimizer.learning_rate": 2e-2,
        "sample.prompts": ("a red sks-toy cube", "a sks-toy sphere"),
    },
}


def get_config(form: str = "") -> ml_collections.ConfigDict:
    return in_form(default_recipe(SETTINGS), form, FORMS)
