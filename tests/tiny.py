"""A cascade of two tiny stages with random weights, for tests that need whole releases."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from if_jax.checkpoints.release import read_stage, write_cascade
from if_jax.checkpoints.scheduler import SchedulerConfig
from if_jax.checkpoints.stages import StageDefaults, StageRelease
from if_jax.checkpoints.weights import abstract_params
from if_jax.inference import cascade
from if_jax.models import presets
from if_jax.models.presets import SCALE
from if_jax.models.t5 import T5Config
from if_jax.models.unet import UNetConfig
from if_jax.text.tokens import load_tokenizer

_SHARED = {
    "cross_attention_dim": 32,
    "encoder_hid_dim": 32,
    "attention_head_dim": 16,
    "addition_embed_type_num_heads": 2,
    "norm_num_groups": 8,
}
TEXT = T5Config(vocab_size=384, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
BASE = UNetConfig(8, (16, 32), (1, 1), (False, True), **_SHARED)
SUPER_RESOLUTION = UNetConfig(
    16,
    (16, 32),
    (1, 1),
    (False, False),
    in_channels=6,
    time_embedding_dim=32,
    aug_level_embedding=True,
    time_embedding_act=True,
    resnet_skip_time_act=True,
    resnet_out_scale_factor=SCALE,
    mid_block_scale_factor=SCALE,
    **_SHARED,
)
DEFAULTS = (StageDefaults("3", 4.0), StageDefaults("2", 3.0, 200))


def one_level(config: UNetConfig) -> UNetConfig:
    """The same kind of net without resampling: for training, whose programs take long to compile."""
    return replace(config, block_out_channels=(16,), layers_per_block=(1,), attention_levels=(True,))


def on_one_level(stage: StageRelease) -> StageRelease:
    """The same stage with a net of one level: for tests of many programs."""
    config = one_level(stage.unet_config)
    return replace(stage, unet_config=config, unet_params=random_params(config))


@cache
def random_params(config: UNetConfig | T5Config, seed: int = 0) -> Any:
    """Weights of the size that training gives, none of them zero: what IF starts at zero would hide its branch."""
    rng = np.random.default_rng(seed)

    def fill(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        scale = 0.1 if len(leaf.shape) < 2 else 0.7 / np.sqrt(np.prod(leaf.shape[:-1]))
        offset = 1.0 if len(leaf.shape) < 2 and isinstance(config, T5Config) else 0.0  # gains of T5's norms
        return (rng.normal(size=leaf.shape) * scale + offset).astype(np.float32)

    return jax.tree.map(fill, abstract_params(config))


@contextmanager
def as_presets() -> Iterator[None]:
    """The nets of one level as the presets "tiny-I", "tiny-II" and "tiny", for training with little compiling."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.UNETS, "tiny-I", one_level(BASE))
        patch.setitem(presets.UNETS, "tiny-II", one_level(SUPER_RESOLUTION))
        patch.setitem(presets.T5_ENCODERS, "tiny", TEXT)
        jax.config.update("jax_disable_most_optimizations", True)  # of machine code: most of the time goes into those
        yield
        jax.config.update("jax_disable_most_optimizations", False)


def write_on_one_level(folder: Path) -> Path:
    """Writes the cascade of nets of one level to a new folder; that folder."""
    write_cascade(folder, [on_one_level(stage) for stage in stages()], DEFAULTS)
    return folder


def stages() -> tuple[StageRelease, StageRelease]:
    """A base stage of 8 px with its byte-level text encoder, and a super-resolution stage of 16 px."""
    tokenizer = load_tokenizer("bytes")
    base = StageRelease("base", BASE, random_params(BASE), SchedulerConfig(1.5), TEXT, random_params(TEXT), tokenizer)
    return base, StageRelease(
        "super-resolution", SUPER_RESOLUTION, random_params(SUPER_RESOLUTION), SchedulerConfig(1.0)
    )


def shrink_demo(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Puts these stages, on one level, in the place of the demo's: its presets, and its release, written to `folder`.

    For commands, examples and notebooks as they stand: the same code, in seconds.
    """
    base, later = (on_one_level(stage) for stage in stages())
    later = replace(later, unet_config=replace(later.unet_config, norm_num_groups=4))  # that can start as a copy
    small = [
        replace(stage, scheduler=read_stage(cascade.DEMO / name, dtype=None).scheduler)
        for stage, name in zip((base, later), ("stage_I", "stage_II"), strict=True)
    ]
    write_cascade(folder, small, DEFAULTS, overwrite=True)
    patch.setattr(cascade, "DEMO", folder)
    for name, stage in zip(("demo-I", "demo-II"), small, strict=True):
        patch.setitem(presets.UNETS, name, stage.unet_config)
    patch.setitem(presets.T5_ENCODERS, "demo", TEXT)


def open_in_diffusers(folder: Path, dtype: str = "float32", **parts: Any) -> Any:
    """A release folder as the pipeline of stock diffusers; `parts` replace components."""
    import torch
    from diffusers import DiffusionPipeline

    with warnings.catch_warnings():  # `dtype` is the newer word, which the oldest diffusers we support does not know
        warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")
        pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype), **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
