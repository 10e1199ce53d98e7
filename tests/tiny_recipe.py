"""A recipe of the base stage with its text encoder, of one level each: for commands in processes of their own."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import tiny

from if_jax.models import presets
from if_jax.recipes import default_recipe


def get_config():
    presets.UNETS["tiny-I"], presets.T5_ENCODERS["tiny"] = tiny.one_level(tiny.BASE), tiny.TEXT
    config = default_recipe()
    config.unet, config.text_encoder = "tiny-I", "tiny"
    config.prediction = "v"
    config.batch_size, config.log_every = 8, 1
    config.data.size, config.data.threads = 8, 1
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 1e-3, 2
    config.sample.every = 0
    return config


def arguments(keys: Mapping[str, Any], config: str | Path = __file__) -> list[str]:
    """The recipe with some keys changed, as a command takes it."""
    return ["--config", str(config), *(f"--config.{name}={value}" for name, value in keys.items())]
