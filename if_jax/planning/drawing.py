"""The plan of drawing with a cascade: what a picture takes on a chip, and what a thousand cost. Starts nothing.

Every device holds the whole cascade in bfloat16 and draws its own pictures, so that nothing travels between chips.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from if_jax.checkpoints.release import read_cascade
from if_jax.checkpoints.stages import IF_DEFAULTS, STAGE_NAMES, StageDefaults
from if_jax.checkpoints.weights import boxed_params
from if_jax.diffusion.schedule import parse_steps
from if_jax.inference.cascade import DEMO
from if_jax.models import presets
from if_jax.models.flops import t5_flops, unet_flops
from if_jax.models.t5 import T5Config
from if_jax.models.unet import UNetConfig
from if_jax.planning.blocks import Block, PassSettings, t5_blocks, unet_blocks
from if_jax.planning.compiling import Figures, Progress, cache_folder, figures_of, libtpu_version
from if_jax.planning.estimate import Computing, Time
from if_jax.planning.memory import padded
from if_jax.planning.slices import Slice

_DTYPE, _BYTES = "bfloat16", 2


@dataclass(frozen=True)
class Nets:
    """What a cascade consists of; its weights need not be there."""

    name: str
    unets: tuple[UNetConfig, ...]
    defaults: tuple[StageDefaults, ...]
    text: T5Config


@dataclass(frozen=True)
class Part:
    """One network of a cascade, drawing its part of the pictures."""

    name: str  # "text encoder", "I", "II", …
    size: int  # of the pictures, pixels; 0 for the text encoder
    calls: int
    rows: int  # pictures in a call on one device, each of both branches of guidance
    blocks: Counter[Block]
    flops: float  # of all calls on one device


@dataclass(frozen=True)
class PartTime:
    """How long a network takes for one batch."""

    part: Part
    time: Time
    peak_share: Time


@dataclass(frozen=True)
class DrawingPlan:
    """All that is known of a cascade that draws on a slice."""

    nets: Nets
    slice: Slice
    batch: int  # pictures at a time, of one device
    price: float | None  # of a chip for an hour
    libtpu: str
    memory: dict[str, int]  # bytes of a device by kind
    parts: list[PartTime]
    computing: Computing
    blocks: int

    @property
    def total(self) -> Time:
        """Seconds from prompts to pictures, of all stages."""
        times = [part.time for part in self.parts]
        return Time(*(sum(getattr(time, name) for time in times) for name in ("middle", "best", "worst")))

    @property
    def fits(self) -> bool:
        """Whether a device has the memory."""
        return sum(self.memory.values()) <= self.slice.device_memory

    @property
    def chip_hours(self) -> Time:
        """Of a thousand pictures."""
        devices = self.slice.generation.devices
        return self.total.times(1000 / (self.batch * devices * 3600))


def read_nets(cascade: str, stages: int | None = None) -> Nets:
    """The networks of a release, or of the presets that are named.

    Args:
      cascade: a release folder, "demo", or preset names joined by commas: "IF-I-XL,IF-II-L".
      stages: only so many.

    Raises:
      FileNotFoundError, ValueError: it is neither; it does not hold together.
    """
    folder, names = DEMO if cascade == "demo" else Path(cascade), cascade.split(",")
    if folder.is_dir():
        read, defaults = read_cascade(folder, None, stages)
        if read[0].clip or read[0].text_config is None:
            raise ValueError(f"{cascade}: it reads other encoders than T5 alone, which a plan does not know")
        return Nets(cascade, tuple(stage.unet_config for stage in read), tuple(defaults), read[0].text_config)
    if unknown := [name for name in names if name not in presets.UNETS]:
        raise FileNotFoundError(
            f"{unknown[0]!r} is neither a release folder nor one of {', '.join(presets.UNETS)}: join several by commas"
        )
    unets = tuple(presets.UNETS[name] for name in names)[:stages]
    if any(unet.aug_level_embedding != (place > 0) for place, unet in enumerate(unets)):
        raise ValueError(f"{cascade!r}: a base stage comes first, super-resolution stages follow")
    width = unets[0].encoder_hid_dim
    text = next(text for text in presets.T5_ENCODERS.values() if text.d_model == width)
    return Nets(cascade, unets, IF_DEFAULTS[: len(unets)], text)


def plan_drawing(
    nets: Nets,
    slice_: Slice,
    batch: int = 1,
    *,
    price: float | None = None,
    progress: Progress | None = None,
    folder: Path | None = None,
) -> DrawingPlan:
    """Plans drawing, each stage by its own default steps and guidance.

    Args:
      nets: of the cascade.
      slice_: where.
      batch: pictures at a time, of one device.
      price: of a chip for an hour.
      progress: see `figures_of`.
      folder: of the cache; None: the user's.

    Raises:
      ValueError: there is no TPU compiler.
    """
    libtpu, g = libtpu_version(), slice_.generation
    parts = _parts(nets, batch, g.devices / g.compiled_cores)
    figures = figures_of({block for part in parts for block in part.blocks}, g, folder or cache_folder(), progress)
    computing, times = Computing(), []
    for part in parts:
        own = Computing()
        own.add(part.blocks, figures, part.calls / g.hertz)
        computing.add(part.blocks, figures, part.calls / g.hertz, kind=part.name)
        time = own.time()
        ideal = part.flops * g.devices / g.peak_flops
        share = Time(*(ideal / max(value, 1e-12) for value in (time.middle, time.best, time.worst)))
        times.append(PartTime(part, time, share))
    memory = _memory(nets, parts, figures, g.compiled_cores / g.devices)
    return DrawingPlan(nets, slice_, batch, price, libtpu, memory, times, computing, len(figures))


def _parts(nets: Nets, batch: int, devices_per_core: float) -> list[Part]:
    def settings(rows: int) -> PassSettings:
        return PassSettings(max(1, math.ceil(rows * devices_per_core)), "forward", _DTYPE, text_length=length)

    length = nets.defaults[0].text_length
    blocks = t5_blocks(nets.text, settings(batch))
    parts = [Part("text encoder", 0, 1, batch, blocks, batch * t5_flops(nets.text, length))]
    for name, unet, default in zip(STAGE_NAMES, nets.unets, nets.defaults, strict=False):
        size, rows = unet.sample_size, batch * (1 if default.guidance_scale == 1.0 else 2)
        calls = len(parse_steps(default.sample_timestep_respacing))
        blocks = unet_blocks(unet, (size, size), settings(rows))
        parts.append(Part(name, size, calls, rows, blocks, calls * rows * unet_flops(unet, size, length)))
    return parts


def _memory(nets: Nets, parts: Sequence[Part], figures: dict[Block, Figures], cores: float) -> dict[str, int]:
    """Weights exactly; what the skips keep; the largest scratch of a block."""
    weights = {"UNets": nets.unets, "text encoder": (nets.text,)}
    kinds = {name: sum(map(_weights, configs)) for name, configs in weights.items()}
    stages = zip(nets.unets, parts[1:], strict=True)
    kinds["skips"] = max(part.rows * _skip_bytes(unet) for unet, part in stages)
    scratch = max(own.get("scratch", 0) for own in figures.values())
    return kinds | {"workspace": math.ceil(cores * scratch)}


def _weights(config: UNetConfig | T5Config) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(boxed_params(config))) * _BYTES


def _skip_bytes(unet: UNetConfig) -> int:
    """What a call keeps of one picture from the way down for the way up."""
    sizes = [(0, unet.block_out_channels[0])]
    for level, width in enumerate(unet.block_out_channels):
        sizes += [(level, width)] * unet.layers_per_block[level]
        if level + 1 < len(unet.block_out_channels):
            sizes.append((level + 1, width))
    return sum((unet.sample_size >> level) ** 2 * padded(width) * _BYTES for level, width in sizes)
