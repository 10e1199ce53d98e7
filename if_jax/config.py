"""Recipes: one `ml_collections.ConfigDict` per training run, turned into frozen dataclasses at the door.

The dataclasses below hold every key and its default, once. A file in `configs/` sets what differs (`recipes.py` holds
what such files share), the command line the rest (`--config.optimizer.learning_rate=2e-4`). Nothing further in sees a
ConfigDict.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections

from if_jax.data.index import Filter
from if_jax.data.preprocessing import Preparation
from if_jax.models import presets

STAGE_KINDS = ("base", "super-resolution")
PREDICTIONS = ("eps", "v", "x0")
LOSS_WEIGHTS = ("none", "min-snr", "sigmoid")  # of diffusion/losses.py
OPTIMIZERS = ("adamw", "adafactor", "muon")
LR_SCHEDULES = ("cosine", "one-cycle", "constant")
REMAT = ("none", "blocks", "dots")
DTYPES = ("float32", "bfloat16")
RULES = ("dp", "fsdp", "fsdp_tp")  # the rule sets of parallel/rules.py


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where pictures and captions come from."""

    # "scenes" or "tasks" (drawn on the fly), a folder of pictures, tar files, a data set built here or prepared by
    # TensorFlow Datasets, or a mixture: "0.7*data/photos + 0.3*scenes"
    source: str = "scenes"
    size: int = 64  # side of the pictures, pixels
    crop: int = 0  # super-resolution: train on random crops of this side; 0 = the full frame
    low_size: int = 64  # super-resolution: side of the low-resolution picture the stage starts from
    low_blur: float = 0.0  # super-resolution: half of the low-res pictures are blurred, σ in [0, this] of their pixels
    caption_dropout: float = 0.1  # share of captions replaced by "" (what guidance calls unconditional)
    embeddings: str = ""  # folder of text states that `if-jax embed` wrote for this source and text encoder
    seed: int = 0
    threads: int = 2  # batches made ahead at the same time (in each worker)
    workers: int = 0  # processes that read and decode stored pictures; 0: this one does
    preparation: Preparation = dataclasses.field(default_factory=Preparation)
    keep: Filter = dataclasses.field(default_factory=Filter)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer behind a global-norm clip, and its learning rate over the run."""

    name: str = "adamw"  # adamw, adafactor (T5X's, no first moment) or muon (kernels orthogonalised, the rest Adam)
    schedule: str = "cosine"  # linear warm-up then cosine; one-cycle: cosine up as well (IF); constant after warm-up
    learning_rate: float = 1e-4  # at the peak
    initial_learning_rate: float = 0.0
    final_learning_rate: float = 0.0
    warmup_steps: int = 1000
    moment_dtype: str = "float32"  # of AdamW's and Muon's first moment; the second stays float32
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.0
    clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis (-1 takes the rest) and the rule set that places arrays on them."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    rules: str = "dp"


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """The fixed prompts drawn during training, with the EMA weights."""

    every: int = 1000  # steps; 0 = never
    prompts: tuple[str, ...] = (
        "two red spheres and a blue cube",
        "a green cylinder",
        "three yellow cubes",
        "a purple sphere left of a red cube",
    )
    steps: str = "smart27"
    guidance_scale: float = 4.0
    aug_level: int = 100  # super-resolution: noise level of the low-resolution picture, 0…999


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """The fixed-timestep loss on held-out pictures: one number per timestep, the same on any number of devices."""

    every: int = 0  # steps; 0 = never
    source: str = "scenes"  # another seed of the scenes, or a data set kept out of training; samples of
    # super-resolution enlarge pictures of it
    samples: int = 64
    batch_size: int = 16
    timesteps: tuple[int, ...] = (50, 250, 500, 750, 950)
    aug_level: int = 250  # super-resolution: noise level of the low-resolution picture
    seed: int = 1_000_003  # of scenes, and of the noise


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """When an update is left out, and when a run stops: a gradient that is not finite, or far above its average."""

    spike_factor: float = 20.0  # times the running average of the gradient norm; 0 = only what is not finite
    grace_steps: int = 100  # before the average is trusted
    max_in_a_row: int = 10  # so many updates left out one after another stop the run


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """How long the processes of one run wait for each other, seconds."""

    start_seconds: int = 300  # for all to come, and to tell what they run
    heartbeat_seconds: int = 100  # silence after which a process counts as dead and the others leave
    step_seconds: int = 1800  # without a step, a validation or a sheet of samples: the process leaves; 0 = never


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run."""

    stage: str = "base"  # "base" (text → picture) or "super-resolution" (low-resolution picture and text → 4×)
    unet: str = "demo-I"  # a name in models/presets.py
    text_encoder: str = "demo"  # the T5 preset that is trained together with a base stage
    text_encoder_from: str = ""  # or the stage folder whose encoder is used, frozen; later stages need it
    init_from: str = ""  # a stage folder of a release whose weights training starts from
    init_only: str = ""  # only weights whose name holds this pattern (regular expression), the others at random
    prediction: str = "eps"  # what the UNet's first three channels mean: "eps" (IF), "v" or "x0"
    loss_weight: str = "none"  # of the squared error by timestep: none (IF), min-snr or sigmoid
    pooled_dropout: float = 0.0  # share of pictures whose step embedding is not told the text: attention must read it
    noise_size: int = 64  # the cosine schedule, shifted to be as noisy for pictures of this side as 64 px are (IF: 64)
    sample_max_value: float = 1.5  # ceiling of dynamic thresholding when sampling; IF: 1.5 base, 1.0 later
    batch_size: int = 64  # pictures per update
    accumulate: int = 1  # parts a batch is computed in, one after another, for less memory
    steps: int = 100_000
    compute_dtype: str = "float32"  # of matrix products and convolutions; the state is float32
    remat: str = "none"  # what the backward pass computes again: nothing, whole blocks, all but matrix products
    ema_decays: tuple[float, ...] = (0.9999,)  # the first one is drawn with and released
    seed: int = 0
    log_every: int = 50
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2  # the newest ones
    keep_every: int = 0  # steps; checkpoints at multiples of it are kept for good, 0 = none
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    validation: ValidationConfig = dataclasses.field(default_factory=ValidationConfig)
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    hosts: HostsConfig = dataclasses.field(default_factory=HostsConfig)
    wandb: str = ""  # project on Weights & Biases, "" = not used; WANDB_MODE=offline works without a network
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)


def to_recipe(config: Mapping[str, Any]) -> Recipe:
    """Turns a ConfigDict (or plain dict) into a checked `Recipe`.

    Raises:
      ValueError: an unknown key, a wrong type or a value that cannot work; names the key, the value and what would do.
    """
    raw = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
    recipe = _build(Recipe, raw, "")
    _check(recipe)
    return recipe


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON-ready values, for checkpoints and releases."""
    return _plain(dataclasses.asdict(recipe))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The dotted keys in which two recipes (as dicts) differ, with both values."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found[prefix + key] = (a, b)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def _build(cls: type, raw: Mapping[str, Any], prefix: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in raw:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.4)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(fields)}"
            raise ValueError(f"recipe has no key {prefix}{key} (value {raw[key]!r}): {hint}")
    values = {}
    for name in fields:
        if name not in raw:
            continue
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(raw[name], Mapping):
                raise ValueError(f"recipe key {prefix}{name} is {raw[name]!r}: it must hold the keys of a section")
            values[name] = _build(hint, raw[name], f"{prefix}{name}.")
        else:
            values[name] = _coerce(raw[name], hint, prefix + name)
    return cls(**values)


def _coerce(value: Any, hint: Any, key: str) -> Any:
    if isinstance(hint, types.GenericAlias):  # tuple[str, ...]
        entry = typing.get_args(hint)[0]
        if isinstance(value, list | tuple):
            return tuple(_coerce(v, entry, f"{key}[{i}]") for i, v in enumerate(value))
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    listed = isinstance(hint, types.GenericAlias)
    wanted = f"a list of {typing.get_args(hint)[0].__name__}" if listed else f"a {hint.__name__}"
    raise ValueError(f"recipe key {key} is {value!r} ({type(value).__name__}): it must be {wanted}")


def _check(recipe: Recipe) -> None:
    _choice("stage", recipe.stage, STAGE_KINDS)
    _choice("prediction", recipe.prediction, PREDICTIONS)
    _choice("loss_weight", recipe.loss_weight, LOSS_WEIGHTS)
    _choice("compute_dtype", recipe.compute_dtype, DTYPES)
    _choice("remat", recipe.remat, REMAT)
    _choice("optimizer.name", recipe.optimizer.name, OPTIMIZERS)
    _choice("optimizer.schedule", recipe.optimizer.schedule, LR_SCHEDULES)
    _choice("optimizer.moment_dtype", recipe.optimizer.moment_dtype, DTYPES)
    _choice("unet", recipe.unet, tuple(presets.UNETS))
    _choice("mesh.rules", recipe.mesh.rules, RULES)
    for key in ("batch_size", "accumulate", "steps", "log_every", "checkpoint_every", "keep_checkpoints", "noise_size"):
        if getattr(recipe, key) < 1:
            raise ValueError(f"recipe key {key} is {getattr(recipe, key)}: it must be at least 1")
    if recipe.checkpoint_every % recipe.log_every:  # a resumed run must repeat whole windows of the log
        raise ValueError(
            f"recipe key checkpoint_every is {recipe.checkpoint_every}: "
            f"it must be a multiple of log_every {recipe.log_every}"
        )
    if recipe.batch_size % recipe.accumulate:
        raise ValueError(f"recipe key accumulate is {recipe.accumulate}: it must divide batch_size {recipe.batch_size}")
    if not recipe.ema_decays:
        raise ValueError("recipe key ema_decays is empty: give at least one decay, such as 0.9999")
    decays = [(f"ema_decays[{i}]", decay) for i, decay in enumerate(recipe.ema_decays)]
    for key, value in (*decays, ("data.caption_dropout", recipe.data.caption_dropout)):
        if not 0 <= value < 1:
            raise ValueError(f"recipe key {key} is {value}: it must lie in [0, 1)")
    if not 0 <= recipe.pooled_dropout <= 1:
        raise ValueError(f"recipe key pooled_dropout is {recipe.pooled_dropout}: it must lie in [0, 1]")
    _check_validation(recipe.validation)
    if recipe.guard.max_in_a_row < 1 or recipe.guard.spike_factor < 0:
        raise ValueError(f"recipe section guard: {recipe.guard}: max_in_a_row is at least 1, spike_factor at least 0")
    try:
        re.compile(recipe.init_only)
    except re.error as error:
        raise ValueError(f"recipe key init_only is {recipe.init_only!r}: no regular expression ({error})") from None
    if recipe.init_only and not recipe.init_from:
        raise ValueError(f"recipe key init_only is {recipe.init_only!r} without init_from: name the stage folder too")
    _check_data(recipe)
    unet = presets.UNETS[recipe.unet]
    super_resolution = recipe.stage == "super-resolution"
    if unet.aug_level_embedding != super_resolution:
        kind = "super-resolution" if unet.aug_level_embedding else "base"
        raise ValueError(f"recipe key unet is {recipe.unet!r}, a {kind} net, but stage is {recipe.stage!r}")
    if super_resolution and not recipe.text_encoder_from:
        raise ValueError("recipe key text_encoder_from is empty: name the release folder whose encoder this stage uses")
    if not recipe.text_encoder_from:
        _choice("text_encoder", recipe.text_encoder, tuple(presets.T5_ENCODERS))
        width = presets.T5_ENCODERS[recipe.text_encoder].d_model
        if width != unet.encoder_hid_dim:
            raise ValueError(
                f"recipe key text_encoder is {recipe.text_encoder!r} of width {width}, but {recipe.unet!r} "
                f"reads states of width {unet.encoder_hid_dim}"
            )
    side, halvings = recipe.data.crop or recipe.data.size, len(unet.block_out_channels) - 1
    if side % 2**halvings:
        raise ValueError(f"pictures of side {side} cannot be halved {halvings} times: use a multiple of {2**halvings}")
    if super_resolution and recipe.data.size % recipe.data.low_size:
        raise ValueError(f"recipe key data.size is {recipe.data.size}: it must be a multiple of data.low_size")
    if recipe.data.crop > recipe.data.size:
        raise ValueError(f"recipe key data.crop is {recipe.data.crop}: it must be at most data.size {recipe.data.size}")


def _check_data(recipe: Recipe) -> None:
    data = recipe.data
    if data.embeddings and not recipe.text_encoder_from:
        raise ValueError(
            f"recipe key data.embeddings is {data.embeddings!r} without text_encoder_from: an encoder that is trained "
            "makes other states every step; name the frozen one"
        )
    if not 0.0 <= data.preparation.shift <= 1.0:
        raise ValueError(f"recipe key data.preparation.shift is {data.preparation.shift}: it must be from 0 to 1")
    if outside := [key for key, value in dataclasses.asdict(data.keep).items() if value < 0]:
        raise ValueError(f"recipe key data.keep.{outside[0]} is negative: 0 lets all pass")


def _check_validation(validation: ValidationConfig) -> None:
    if outside := [t for t in (*validation.timesteps, validation.aug_level) if not 0 <= t < 1000]:
        raise ValueError(f"recipe keys validation.timesteps and aug_level: {outside[0]} is not in 0…999")
    if validation.every and (not validation.timesteps or validation.samples < 1 or validation.batch_size < 1):
        raise ValueError("recipe section validation needs timesteps, and at least one of samples and batch_size")


def _choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"recipe key {key} is {value!r}: it must be one of {', '.join(allowed)}")
