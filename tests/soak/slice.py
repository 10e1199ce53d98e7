"""The recipe of the soak's short form: the base stage with its text encoder, of one level each."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny

from if_jax.models import presets
from if_jax.recipes import default_recipe

presets.UNETS["tiny-I"] = tiny.one_level(tiny.BASE)
presets.T5_ENCODERS["tiny"] = tiny.TEXT


def get_config():
    config = default_recipe()
    config.unet, config.text_encoder = "tiny-I", "tiny"
    config.prediction = "v"
    config.optimizer.learning_rate = 1e-3
    return config
