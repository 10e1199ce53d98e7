"""How a stage samples, as a frozen dataclass and as the scheduler_config.json that stock diffusers reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from if_jax.diffusion.process import Prediction
from if_jax.diffusion.schedule import Schedule, cosine_schedule, schedule_from_betas, trailing_steps

PREDICTIONS: dict[Prediction, str] = {
    "eps": "epsilon",
    "v": "v_prediction",
    "x0": "sample",
}  # our words → those of diffusers
SCHEDULERS: dict[str, str] = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler"}
_SPACINGS = ("leading", "linspace", "trailing")
_VARIANCES = ("learned_range", "fixed_small")  # IF's; and what diffusers' DreamBooth and LoRA scripts leave
_LATER = ("timestep_spacing", "steps_offset")  # keys that IF's own files lack: written only where they say something
# What diffusers' DDIMScheduler must say, or assume: that the last jump ends at the clean picture.
_OF_DDIM = {"set_alpha_to_one": True}


@dataclass(frozen=True)
class SchedulerConfig:
    """The noise schedule and clipping a stage was trained for; field names are those of diffusers' DDPMScheduler.

    A stage that was distilled draws by DDIM: its file is one of diffusers' DDIMScheduler.

    Raises:
      ValueError: if_jax does not sample such a stage.
    """

    sample_max_value: float  # ceiling of dynamic thresholding: IF has 1.5 in stage I, 1.0 (plain clipping) later
    dynamic_thresholding_ratio: float = 0.95
    num_train_timesteps: int = 1000
    beta_schedule: str = "squaredcos_cap_v2"
    prediction_type: str = "epsilon"
    variance_type: str = "learned_range"  # fixed_small: the UNet's variance channels are not read
    trained_betas: tuple[float, ...] | None = None  # a schedule of its own, in place of beta_schedule
    timestep_spacing: str = "leading"  # how `num_inference_steps` is spread over the chain
    steps_offset: int = 0  # added to each of those steps where the spacing is "leading"
    sampler: str = "ddpm"  # that it draws with unless asked otherwise

    def __post_init__(self) -> None:
        allowed = {
            "num_train_timesteps": (1000,),
            "beta_schedule": ("squaredcos_cap_v2",),
            "prediction_type": tuple(PREDICTIONS.values()),
            "variance_type": _VARIANCES,
            "timestep_spacing": _SPACINGS,
            "steps_offset": range(self.num_train_timesteps),
            "sampler": tuple(SCHEDULERS),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                choices = "0…999" if name == "steps_offset" else " or ".join(map(repr, values))
                raise ValueError(f"scheduler {name} is {getattr(self, name)!r}: if_jax samples {choices}")
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            count = len(self.trained_betas)
            raise ValueError(f"scheduler trained_betas holds {count} numbers, one for each of 1000 steps is needed")
        if not 0 < self.dynamic_thresholding_ratio <= 1 or self.sample_max_value < 1:
            raise ValueError(
                f"scheduler dynamic_thresholding_ratio {self.dynamic_thresholding_ratio} and sample_max_value "
                f"{self.sample_max_value}: the first must lie in (0, 1], the second be at least 1"
            )

    def schedule(self) -> Schedule:
        """The chain the stage was trained on, as tables."""
        if self.trained_betas is not None:
            return schedule_from_betas(self.trained_betas)
        return cosine_schedule(self.num_train_timesteps)

    def spread(self, count: int) -> list[int]:
        """`num_inference_steps` as timesteps, in no order, the way DDPMScheduler.set_timesteps spreads them."""
        total = self.num_train_timesteps
        if self.timestep_spacing == "linspace":
            return np.linspace(0, total - 1, count).round().astype(int).tolist()
        if self.timestep_spacing == "trailing":
            return trailing_steps(count, total)
        return [step * (total // count) + self.steps_offset for step in range(count)]

    @property
    def prediction(self) -> Prediction:
        """What the UNet's first three channels mean: "eps", "v" or "x0"."""
        return next(ours for ours, theirs in PREDICTIONS.items() if theirs == self.prediction_type)


def scheduler_to_diffusers(config: SchedulerConfig) -> dict[str, Any]:
    """The configuration of diffusers' scheduler that draws as we do, with the keys IF publishes."""
    own = dataclasses.asdict(config)
    sampler = own.pop("sampler")
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    return {
        "_class_name": SCHEDULERS[sampler],
        **(_OF_DDIM if sampler == "ddim" else {}),
        **{name: value for name, value in own.items() if name not in _LATER or value != defaults[name]},
        "thresholding": True,
        "clip_sample": True,  # ignored by diffusers while thresholding is on
        "clip_sample_range": 1.0,
        "trained_betas": None if config.trained_betas is None else list(config.trained_betas),
    }


def noising_scheduler_to_diffusers() -> dict[str, Any]:
    """The scheduler that noises the low-resolution image of a super-resolution stage: only its alpha_bar is used."""
    return {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000}


def check_noising_scheduler(content: Mapping[str, Any]) -> None:
    """Refuses an image_noising_scheduler that adds other noise than we do.

    Args:
      content: of its scheduler_config.json.

    Raises:
      ValueError: names what differs.
    """
    _check_class("image_noising_scheduler", content, ("DDPMScheduler",))
    for name, ours in (*noising_scheduler_to_diffusers().items(), ("trained_betas", None)):
        value = content.get(name, {"beta_schedule": "linear"}.get(name, ours))
        if value != ours:
            raise ValueError(f"image_noising_scheduler {name} is {value!r:.80}: if_jax noises by {ours!r}")


def _check_class(part: str, content: Mapping[str, Any], known: Collection[str]) -> str:
    """The class of a scheduler; ValueError where it draws other pictures than we do."""
    name = content.get("_class_name", "DDPMScheduler")
    if name not in known:
        raise ValueError(
            f"{part} is a {name}, which draws other pictures: if_jax reads {' or '.join(known)}; save the pipeline "
            "with DDPMScheduler.from_config(pipeline.scheduler.config), and choose a sampler when drawing"
        )
    return name


def scheduler_from_diffusers(content: Mapping[str, Any]) -> SchedulerConfig:
    """Reads the scheduler_config.json of a DDPMScheduler, the one that IF publishes, or of a DDIMScheduler.

    Args:
      content: of the file; where a key is absent, what those classes assume.

    Returns:
      How the stage samples.

    Raises:
      ValueError: its class or a setting would draw other pictures than we do.
    """
    name = _check_class("scheduler", content, SCHEDULERS.values())
    sampler = next(ours for ours, theirs in SCHEDULERS.items() if theirs == name)
    if sampler == "ddim" and content.get("timestep_spacing") == "linspace":
        raise ValueError(f"scheduler timestep_spacing is 'linspace' of a {name}, which jumps past the steps it visits")
    if sampler == "ddim" and not content.get("set_alpha_to_one", True):
        raise ValueError("scheduler set_alpha_to_one is false: if_jax ends at the clean picture")
    if content.get("rescale_betas_zero_snr"):
        raise ValueError("scheduler rescale_betas_zero_snr is true: if_jax samples the schedule as it was trained")
    if content.get("timestep_spacing", "leading") != "leading":
        content = {**content, "steps_offset": 0}  # which then says nothing
    known = {field.name for field in dataclasses.fields(SchedulerConfig)}
    values: dict[str, Any] = {
        "sampler": sampler,
        "beta_schedule": "linear",
        "variance_type": "fixed_small",
        "sample_max_value": 1.0,
    }
    values |= {
        "dynamic_thresholding_ratio": 0.995,
        **{key: content[key] for key in content if key in known - {"sampler"}},
    }
    if not content.get("thresholding", False):
        if not content.get("clip_sample", True) or content.get("clip_sample_range", 1.0) != 1.0:
            raise ValueError("scheduler has neither thresholding nor clip_sample to [-1, 1]: if_jax always bounds x0")
        values["sample_max_value"] = 1.0  # a threshold that cannot exceed 1 is plain clipping
    if values.get("trained_betas") is not None:
        values["trained_betas"] = tuple(values["trained_betas"])
    return SchedulerConfig(**values)
