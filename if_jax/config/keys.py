"""Every key of a recipe with its type, its default and what else is known of it, once.

A key says by itself which values it takes (its type, its limits, the table that `choices` names, what `parser` reads),
whether it may change when a run is resumed, and whether the compiled training step depends on it. Numbers are finite.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, Literal, TypeVar

from if_jax.checkpoints.stages import StageKind
from if_jax.data.index import Filter
from if_jax.data.preprocessing import Preparation
from if_jax.data.remote import RemoteSettings
from if_jax.diffusion.distillation import METHODS, DistillMethod, student_timesteps
from if_jax.diffusion.losses import Weight
from if_jax.diffusion.power_average import LONGEST
from if_jax.diffusion.process import Prediction
from if_jax.diffusion.schedule import parse_steps
from if_jax.models import presets
from if_jax.models.blocks import Remat
from if_jax.models.conditioning import parse_encoders
from if_jax.parallel.rules import PRESETS as RULE_SETS
from if_jax.text.tokens import TEXT_LENGTH

OptimizerName = Literal["adamw", "adafactor", "muon"]
LearningRateSchedule = Literal["cosine", "one-cycle", "constant"]
Dtype = Literal["float32", "bfloat16"]
Default = TypeVar("Default")


def key(
    default: Default,
    *,
    resumable: bool = False,
    compiled: bool = True,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Collection[str] | None = None,
    parser: Callable[[Any], object] | None = None,
    path: bool = False,
) -> Default:
    """A recipe key, or a whole section of keys, with what is known of it besides its type.

    Args:
      default: its value unless set; of a section, the section with its defaults.
      resumable: a run may go on with another value.
      compiled: the compiled training step depends on it.
      minimum: the least value it takes; of a list, the least each entry takes, as with the other limits.
      maximum: the greatest value it takes.
      above: all its values are greater than this.
      below: all its values are less than this.
      choices: the table whose names it takes; looked up whenever a recipe is read.
      parser: reads the value where it is used, and raises ValueError for one that it cannot read.
      path: it names a folder; a `~` at its start is the home folder.

    Returns:
      The dataclass field, typed as the default it has.
    """
    known = {"resumable": resumable, "compiled": compiled, "choices": choices, "parser": parser, "path": path}
    limits = {"minimum": minimum, "maximum": maximum, "above": above, "below": below}
    return dataclasses.field(default=default, metadata=known | limits)


def _seed(default: int, compiled: bool = True) -> int:
    return key(default, minimum=0, maximum=2**31 - 2, compiled=compiled)  # the noise is that of the seed after it


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where pictures and captions come from."""

    # "scenes" or "tasks" (drawn on the fly), a folder of pictures, tar files, a data set built here or prepared by
    # TensorFlow Datasets, on a disk or in a bucket (gs://…), or a mixture: "0.7*data/photos + 0.3*scenes"
    source: str = key("scenes", compiled=False)
    size: int = key(64, minimum=8)  # side of the pictures, pixels
    crop: int = key(0, minimum=0)  # super-resolution: train on random crops of this side; 0 = the full frame
    low_size: int = key(64, minimum=1)  # super-resolution: side of the low-resolution picture the stage starts from
    # super-resolution: half of the low-res pictures are blurred, σ in [0, this] of their pixels
    low_blur: float = key(0.0, minimum=0)
    # super-resolution: the low-resolution picture is noised at a random level from 0 to this; IF: 999
    max_aug_level: int = key(999, minimum=0, maximum=999)
    # share of captions replaced by "" (what guidance calls unconditional)
    caption_dropout: float = key(0.1, minimum=0, below=1, compiled=False)
    # folder of text states that `if-jax embed` wrote for this source and text encoder
    embeddings: str = key("", path=True)
    seed: int = _seed(0, compiled=False)
    # batches made ahead at the same time (in each worker)
    threads: int = key(2, minimum=0, resumable=True, compiled=False)
    # processes that read and decode stored pictures; 0: this one does
    workers: int = key(0, minimum=0, resumable=True, compiled=False)
    preparation: Preparation = key(Preparation(), compiled=False)
    keep: Filter = key(Filter(), compiled=False)
    # a file with a key, the address of a picture or the SHA-256 of an address a line: records that are not used
    exclude: str = key("", compiled=False, path=True)
    remote: RemoteSettings = key(RemoteSettings(), resumable=True, compiled=False)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer behind a global-norm clip, and its learning rate over the run."""

    name: OptimizerName = "adamw"  # adafactor: T5X's, no first moment; muon: kernels orthogonalised, the rest Adam
    # linear warm-up then cosine; one-cycle: cosine up as well (IF); constant after warm-up
    schedule: LearningRateSchedule = "cosine"
    learning_rate: float = key(1e-4, above=0)  # at the peak
    initial_learning_rate: float = key(0.0, minimum=0)
    final_learning_rate: float = key(0.0, minimum=0)
    warmup_steps: int = key(1000, minimum=0)
    moment_dtype: Dtype = "float32"  # of AdamW's and Muon's first moment; the second stays float32
    b1: float = key(0.9, minimum=0, below=1)
    b2: float = key(0.99, minimum=0, below=1)
    weight_decay: float = key(0.0, minimum=0)
    clip_norm: float = key(1.0, above=0)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis (-1 takes the rest) and the rule set that places arrays on them."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    rules: str = key("dp", choices=RULE_SETS)


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """The fixed prompts drawn during training, with the EMA weights."""

    every: int = key(1000, minimum=0)  # steps; 0 = never
    prompts: tuple[str, ...] = (
        "two red spheres and a blue cube",
        "a green cylinder",
        "three yellow cubes",
        "a purple sphere left of a red cube",
    )
    steps: str = key("smart27", parser=parse_steps)
    guidance_scale: float = 4.0
    aug_level: int = key(100, minimum=0, maximum=999)  # super-resolution: noise level of the low-resolution picture


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """The fixed-timestep loss on held-out pictures: one number per timestep, the same on any number of devices."""

    every: int = key(0, minimum=0)  # steps; 0 = never
    # another seed of the scenes, or a data set kept out of training; samples of super-resolution enlarge pictures of it
    source: str = "scenes"
    samples: int = key(64, minimum=1)
    batch_size: int = key(16, minimum=1)
    timesteps: tuple[int, ...] = key((50, 250, 500, 750, 950), minimum=0, maximum=999)
    aug_level: int = key(250, minimum=0, maximum=999)  # super-resolution: noise level of the low-resolution picture
    seed: int = _seed(1_000_003)  # of scenes, and of the noise


@dataclasses.dataclass(frozen=True)
class ConditioningConfig:
    """Which encoders a stage is told by. CLIP is always frozen; what is dropped is zero."""

    # joined by "+": t5, clip (its text encoder), clip_image (a picture's vector; training shows it the picture itself)
    encoders: str = key("t5", parser=parse_encoders)
    # transformers' folder of a CLIPModel; "": the CLIP that the release text_encoder_from brings
    clip_from: str = key("", path=True)
    # share of pictures that are drawn without T5's states; each encoder is dropped by itself, so at times all are
    t5_dropout: float = key(0.0, minimum=0, below=1)
    clip_dropout: float = key(0.0, minimum=0, below=1)  # the same of CLIP's text encoder
    clip_image_dropout: float = key(0.1, minimum=0, below=1)  # the same of a picture's vector
    image_tokens: int = key(4, minimum=1)  # that attention reads, made of a picture's vector


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Factors that are trained in place of the weights of `init_from`, which stay as they are."""

    rank: int = key(0, minimum=0)  # of the factors; 0 = all weights are trained
    alpha: float = key(0.0, minimum=0)  # the factors count alpha / rank times; 0 = once
    # layers they go beside, joined by "+": attention, conv, or names such as to_q, mid_block, up_blocks_0/attentions_1
    targets: str = "attention"
    text_encoder: bool = False  # base stages: beside the attention of the frozen text encoder too
    dropout: float = key(0.0, minimum=0, below=1)  # share of what each layer gives to its factors that is left out
    # of the frozen weights in memory; "": compute_dtype; int8: kernels, with one scale for each output channel
    base_dtype: Literal["", "float32", "bfloat16", "int8"] = ""

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return (self.alpha or self.rank) / self.rank if self.rank else 0.0


@dataclasses.dataclass(frozen=True)
class NewWordsConfig:
    """Words that the frozen text encoder gets rows for; those rows are all that is trained (textual inversion)."""

    tokens: tuple[str, ...] = ()  # the words, as captions spell them and part of no other word; () = none
    init: str = ""  # the text whose tokens' rows they begin as the mean of, such as "a dog"; "" = of all rows


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """A student that draws in few steps, without guidance, what a frozen teacher draws in many with it."""

    # what a jump of the student is taught by: progressive: jumps of the teacher; consistency: one of the teacher, then
    # the student's own; "" = no teacher
    method: Literal["", DistillMethod] = ""
    # stage folder of the release that is the teacher; the student starts as a copy of it unless init_from is set
    teacher: str = key("", compiled=False, path=True)
    guidance_scale: float = 1.0  # that the teacher draws at; the student draws the same at 1
    steps: int = key(4, minimum=1)  # the student draws in
    # jumps of the teacher for each of the student's; progressive: 1 = guidance alone is distilled, 2 = the steps are
    # halved; consistency: 20 or more
    substeps: int = key(2, minimum=1)

    @property
    def timesteps(self) -> range:
        """Those that the student is trained at."""
        return student_timesteps(self.method or METHODS[0], self.steps, self.substeps)


@dataclasses.dataclass(frozen=True)
class PosthocEmaConfig:
    """Power-function averages of the weights, from whose snapshots one of any length is made afterwards."""

    # of the averages, as a share of the run: (0.05, 0.1) are those of EDM2; () = none are kept
    lengths: tuple[float, ...] = key((), above=0, maximum=LONGEST)
    every: int = key(
        5000, minimum=1, resumable=True, compiled=False
    )  # steps between snapshots, which are kept for good
    dtype: Dtype = key("float32", resumable=True, compiled=False)  # of snapshots


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """When an update is left out, and when a run stops: a gradient that is not finite, or far above its average."""

    # times the running average of the gradient norm; 0 = only what is not finite
    spike_factor: float = key(20.0, minimum=0)
    grace_steps: int = key(100, minimum=1)  # updates before the average is trusted
    max_in_a_row: int = key(10, minimum=1)  # so many updates left out one after another stop the run


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """How long the processes of one run wait for each other, seconds."""

    start_seconds: int = key(300, minimum=1)  # for all to come, and to tell what they run
    heartbeat_seconds: int = key(100, minimum=1)  # silence after which a process counts as dead; the others leave
    step_seconds: int = key(1800, minimum=0)  # without a step or a sheet of samples: the process leaves; 0 = never


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run."""

    stage: StageKind = "base"  # text → picture, or "super-resolution": low-resolution picture and text → 4×
    unet: str = key("demo-I", choices=presets.UNETS)
    # the T5 preset that is trained together with a base stage
    text_encoder: str = key("demo", choices=presets.T5_ENCODERS)
    # or the stage folder whose encoder is used, frozen; later stages need it
    text_encoder_from: str = key("", path=True)
    # tokens of a caption that T5 reads; IF and diffusers read 77, long captions want 128 or 256
    text_length: int = key(TEXT_LENGTH, minimum=2, maximum=1024)
    conditioning: ConditioningConfig = ConditioningConfig()
    # a stage folder of a release whose weights training starts from
    init_from: str = key("", resumable=True, compiled=False, path=True)
    # only weights whose name holds this pattern (regular expression), the others at random
    init_only: str = key("", resumable=True, compiled=False)
    # a super-resolution net that predicts x0 starts as a copy of its low-resolution input, not at random
    init_copy: bool = key(False, resumable=True, compiled=False)
    prediction: Prediction = "eps"  # what the UNet's first three channels mean: "eps" (IF), "v" or "x0"
    loss_weight: Weight = "none"  # of the squared error by timestep: "none" is IF's
    # of the variational bound, which trains the variance channels alone; IF: 1; 0: the variance is fixed
    bound_weight: float = key(1.0, minimum=0)
    # share of pictures whose step embedding is not told the text: attention must read it
    pooled_dropout: float = key(0.0, minimum=0, maximum=1)
    # the cosine schedule, shifted to be as noisy for pictures of this side as 64 px are (IF: 64)
    noise_size: int = key(64, minimum=1)
    # ceiling of dynamic thresholding when sampling; IF: 1.5 base, 1.0 later
    sample_max_value: float = key(1.5, minimum=1)
    batch_size: int = key(64, minimum=1)  # pictures per update
    # parts a batch is computed in, one after another, for less memory
    accumulate: int = key(1, minimum=1, resumable=True)
    steps: int = key(100_000, minimum=1, resumable=True)
    compute_dtype: Dtype = "float32"  # of matrix products and convolutions; the state is float32
    remat: Remat = "none"  # what the backward pass computes again: nothing, whole blocks, all but matrix products
    # the first one is drawn with and released
    ema_decays: tuple[float, ...] = key((0.9999,), minimum=0, below=1)
    posthoc_ema: PosthocEmaConfig = PosthocEmaConfig()
    seed: int = _seed(0)
    log_every: int = key(50, minimum=1, resumable=True, compiled=False)
    checkpoint_every: int = key(1000, minimum=1, resumable=True, compiled=False)
    keep_checkpoints: int = key(2, minimum=1, resumable=True, compiled=False)  # the newest ones
    # steps; checkpoints at multiples of it are kept for good, 0 = none
    keep_every: int = key(0, minimum=0, resumable=True, compiled=False)
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()
    new_words: NewWordsConfig = NewWordsConfig()
    distill: DistillConfig = DistillConfig()
    mesh: MeshConfig = key(MeshConfig(), resumable=True)
    validation: ValidationConfig = key(ValidationConfig(), resumable=True, compiled=False)
    guard: GuardConfig = GuardConfig()
    hosts: HostsConfig = key(HostsConfig(), resumable=True, compiled=False)
    # project on Weights & Biases, "" = not used; WANDB_MODE=offline works without a network
    wandb: str = key("", resumable=True, compiled=False)
    sample: SampleConfig = key(SampleConfig(), resumable=True, compiled=False)

    @property
    def encoders(self) -> tuple[str, ...]:
        """Those of `conditioning.encoders`, in the order of their rows."""
        return parse_encoders(self.conditioning.encoders)

    @property
    def trains_text(self) -> bool:
        """Whether T5 is trained together with the UNet."""
        return "t5" in self.encoders and not self.text_encoder_from

    @property
    def dropped(self) -> dict[str, float]:
        """Share of the pictures in which each encoder is dropped, where it is at all."""
        shares = {encoder: getattr(self.conditioning, f"{encoder}_dropout") for encoder in self.encoders}
        return {encoder: share for encoder, share in shares.items() if share}

    @property
    def keeps_base(self) -> bool:
        """Whether the weights of `init_from` stay as they are, and something beside them is trained."""
        return bool(self.lora.rank or self.new_words.tokens)
