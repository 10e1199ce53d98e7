"""What a release consists of: stages with their networks, how each draws by default, and how they must fit together."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from if_jax.checkpoints.files import parse_config
from if_jax.checkpoints.names import Params
from if_jax.checkpoints.scheduler import SchedulerConfig
from if_jax.checkpoints.weights import text_encoder_sha256
from if_jax.models.conditioning import CLIPShapes
from if_jax.models.t5 import T5Config
from if_jax.models.unet import UNetConfig
from if_jax.text.clip_tokens import CaptionReader, CLIPTokenizer
from if_jax.text.tokens import TEXT_LENGTH, Tokenizer

StageKind = Literal["base", "super-resolution"]
PIPELINES: dict[StageKind, str] = {"base": "IFPipeline", "super-resolution": "IFSuperResolutionPipeline"}
# Of stages that read others than T5 alone: what no pipeline of diffusers does.
BESIDE_DIFFUSERS: dict[StageKind, str] = {
    "base": "IFJaxPipeline",
    "super-resolution": "IFJaxSuperResolutionPipeline",
}
# diffusers' pipelines of other modes have the same parts and weights
PIPELINE_KINDS: dict[str, StageKind] = {
    **{name: kind for kind, name in BESIDE_DIFFUSERS.items()},
    **{f"IF{mode}Pipeline": "base" for mode in ("", "Img2Img", "Inpainting")},
    **{f"IF{mode}SuperResolutionPipeline": "super-resolution" for mode in ("", "Img2Img", "Inpainting")},
}
STAGE_NAMES = ("I", "II", "III", "IV", "V", "VI")


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """A T5 encoder with its tokenizer; `sha256` is its identity, kept when it is written in another precision."""

    config: T5Config
    params: Params
    tokenizer: Tokenizer
    sha256: str
    notes: Mapping[str, str] = field(default_factory=dict)  # see `StageRelease.notes`


@dataclass(frozen=True, eq=False)
class CLIPEncoder:
    """What a stage reads of a CLIP; `params` are {"clip_text", "clip_vision"} or fewer, `sha256` is of all of them."""

    shapes: CLIPShapes
    params: Mapping[str, Params]
    tokenizer: CLIPTokenizer | None  # with its text encoder
    sha256: str


@dataclass(frozen=True, eq=False)
class Encoders:
    """All that makes a stage's text states; a T5 that is trained with the stage is None."""

    t5: TextEncoder | None = None
    clip: CLIPEncoder | None = None

    @property
    def sha256(self) -> str:
        """Identity of them all, "" where there is nothing frozen."""
        return joined_sha256(self.t5.sha256 if self.t5 else None, self.clip) or ""


@dataclass(frozen=True, eq=False)
class StageRelease:
    """One stage as it is released; parameters are nested dicts of arrays (or `Lazy`) without logical names.

    A super-resolution stage has no text encoder of its own; `text_encoder_sha256` says which one it was trained with
    (None: not known, as for IF's own releases). A base stage may leave it None: it is then computed.
    """

    kind: StageKind
    unet_config: UNetConfig
    unet_params: Params
    scheduler: SchedulerConfig
    text_config: T5Config | None = None
    text_params: Params | None = None
    tokenizer: Tokenizer | None = None
    text_encoder_sha256: str | None = None
    notes: Mapping[str, str] = field(default_factory=dict)  # for the headers of the weight files: recipe, step
    clip: CLIPEncoder | None = None  # of a base stage that reads it besides T5, or in its place

    def __post_init__(self) -> None:
        if self.kind not in PIPELINES:
            raise ValueError(f"stage kind {self.kind!r} is unknown: choose one of {', '.join(PIPELINES)}")
        if (self.kind == "super-resolution") != self.unet_config.aug_level_embedding:
            raise ValueError(f"stage kind is {self.kind!r}, but its UNet is of the other kind")
        if self.text_config is not None and self.text_config.d_model != self.unet_config.encoder_hid_dim:
            raise ValueError(
                f"the text encoder makes states of width {self.text_config.d_model} (d_model), the UNet reads "
                f"{self.unet_config.encoder_hid_dim} (encoder_hid_dim): they were not trained together"
            )

    def text_encoder(self) -> TextEncoder | None:
        """Its own text encoder, where it has one that is complete, with its hash."""
        config, params, tokenizer, sha256 = self.text_config, self.text_params, self.tokenizer, self.text_encoder_sha256
        if config is None or params is None or tokenizer is None or sha256 is None:
            return None
        return TextEncoder(config, params, tokenizer, sha256)

    @property
    def brings_text(self) -> bool:
        """Whether all encoders are there that make what its UNet reads."""
        t5 = None not in (self.text_config, self.text_params, self.tokenizer)
        wanted = {part.encoder for part in self.unet_config.text_parts} or {"t5"}
        clip = self.clip.shapes if self.clip else CLIPShapes(None, None)
        has = {"t5": t5, "clip": clip.text is not None, "clip_image": clip.vision is not None}
        return all(has[encoder] for encoder in wanted)

    @property
    def states_sha256(self) -> str | None:
        """Identity of all encoders that make its text states."""
        return joined_sha256(self.text_encoder_sha256, self.clip)

    def caption_reader(self, length: int) -> CaptionReader:
        """Turns captions into what its encoders take; T5 reads so many tokens."""
        return CaptionReader(self.tokenizer, self.clip.tokenizer if self.clip else None, length)


@dataclass(frozen=True)
class StageDefaults:
    """How a stage draws unless asked otherwise; the words are IF's, `noise_level` is aug_level in steps of 1000."""

    sample_timestep_respacing: str
    guidance_scale: float
    noise_level: int | None = None  # super-resolution stages only
    preserve_case: bool = False  # its captions were not lower-cased, so that its prompts must not be
    text_length: int = TEXT_LENGTH  # tokens of a caption that T5 reads
    max_noise_level: int = 999  # the highest that a super-resolution stage was trained at


# How IF's own code calls its three stages: for releases that say nothing themselves.
IF_DEFAULTS = (StageDefaults("150", 7.0), StageDefaults("smart50", 4.0, 250), StageDefaults("super40", 4.0, 0))


def with_text(stage: StageRelease, text: TextEncoder) -> StageRelease:
    """The stage with a text encoder of its own."""
    return replace(
        stage,
        text_config=text.config,
        text_params=text.params,
        tokenizer=text.tokenizer,
        text_encoder_sha256=text.sha256,
    )


def with_hash(stage: StageRelease) -> StageRelease:
    """The stage with its text encoder's identity filled in, where it can be computed."""
    if stage.text_encoder_sha256 is not None or stage.text_params is None:
        return stage
    return replace(stage, text_encoder_sha256=text_encoder_sha256(stage.text_params))


def check_stages(stages: Sequence[StageRelease], defaults: Sequence[StageDefaults]) -> None:
    """Refuses stages that do not make a cascade.

    Args:
      stages: in order.
      defaults: how each draws.

    Raises:
      ValueError: names the stage, and what does not fit, among others another text encoder than stage I brings.
    """
    if not 1 <= len(stages) <= len(STAGE_NAMES) or len(defaults) != len(stages):
        raise ValueError(f"{len(stages)} stages and {len(defaults)} defaults: give one to {len(STAGE_NAMES)} of each")
    base = stages[0]
    if base.kind != "base" or not base.brings_text:
        raise ValueError("the first stage must be a base stage that brings its text encoder and tokenizer")
    for name, previous, stage in zip(STAGE_NAMES[1:], stages, stages[1:], strict=False):
        size, width = stage.unet_config.sample_size, stage.unet_config.encoder_hid_dim
        same_parts = _without_image_tokens(stage) == _without_image_tokens(base)
        if stage.kind != "super-resolution":
            raise ValueError(f"stage {name} is a {stage.kind} stage: only the first may be")
        smaller = previous.unet_config.sample_size
        if size <= smaller:
            raise ValueError(f"stage {name} draws {size} px, no more than the {smaller} before")
        if size % smaller:
            raise ValueError(
                f"stage {name} draws {size} px from {smaller}, {size / smaller:g} times as much: a stage enlarges by "
                f"a whole number, train it for {size // smaller * smaller} px"
            )
        own = base.unet_config.encoder_hid_dim
        if stage.text_encoder_sha256 not in (None, base.states_sha256) or width != own or not same_parts:
            raise ValueError(
                f"stage {name} was trained with another text encoder ({_brief(stage.text_encoder_sha256)}, width"
                f" {width}) than stage I brings ({_brief(base.states_sha256)}, width {own}):"
                " train it again with text_encoder_from = this base stage"
            )
    for name, stage, default in zip(STAGE_NAMES, stages, defaults, strict=False):
        if (default.noise_level is None) != (stage.kind == "base"):
            needs = "needs a noise_level" if stage.kind == "super-resolution" else "takes no noise_level"
            raise ValueError(f"defaults of stage {name}: a {stage.kind} stage {needs}")
        if default.preserve_case != defaults[0].preserve_case:
            kept = {True: "with their case kept", False: "in lower case"}
            raise ValueError(
                f"stage {name} was trained on captions {kept[default.preserve_case]}, stage I on captions"
                f" {kept[defaults[0].preserve_case]}: all stages are given the same text, train one of them again"
            )
        if default.text_length != defaults[0].text_length:
            raise ValueError(
                f"stage {name} was trained on captions of {default.text_length} tokens, stage I of "
                f"{defaults[0].text_length}: all stages are given the same text, train one of them again"
            )


def joined_sha256(t5: str | None, clip: CLIPEncoder | None) -> str | None:
    """Identity of a T5 (its hash, or None) and a CLIP together; of one alone its own."""
    if clip is None:
        return t5
    return hashlib.sha256(f"{t5}+{clip.sha256}".encode()).hexdigest() if t5 else clip.sha256


def _without_image_tokens(stage: StageRelease) -> list[tuple[str, int, int]]:
    """What the states of a stage hold; how many tokens it makes of a picture's vector is its own affair."""
    return [(part.encoder, part.rows, part.width) for part in stage.unet_config.text_parts]


# What a stage's defaults say only where it is unlike IF's: lower case, so many tokens, any noise level.
_UNLIKE_IF = {"preserve_case": False, "text_length": TEXT_LENGTH, "max_noise_level": 999}


def stage_rows(path: Path, rows: Any, **kinds: type) -> list[dict[str, Any]]:
    """Checks the stages that a file lists.

    Args:
      path: the file, for messages.
      rows: what it lists.
      kinds: type of each key a row must have besides `folder` and `defaults`.

    Returns:
      The rows.

    Raises:
      ValueError: a row lacks a key, or has one of another type.
    """
    known = {field.name for field in fields(StageDefaults)}
    needed, kinds = known - _UNLIKE_IF.keys(), {"folder": str, "defaults": dict, **kinds}
    for row in rows if rows and isinstance(rows, list) else [{}]:
        whole = isinstance(row, dict) and all(isinstance(row.get(key), kind) for key, kind in kinds.items())
        if not whole or not needed <= row["defaults"].keys() <= known:
            raise ValueError(f"{path}: a stage lacks its {' or '.join(kinds)} ({', '.join(sorted(needed))})")
    return rows


def defaults_row(defaults: StageDefaults) -> dict[str, Any]:
    """The defaults as a row holds them."""
    return {name: value for name, value in asdict(defaults).items() if (name, value) not in _UNLIKE_IF.items()}


def read_defaults(path: Path, row: Mapping[str, Any]) -> StageDefaults:
    """Reads the defaults in a row of `stage_rows`.

    Raises:
      ValueError: a value is of the wrong type; names the file `path`.
    """
    return parse_config(path, row["defaults"], lambda values: StageDefaults(**values))


def _brief(sha256: str | None) -> str:
    return (sha256 or "unknown")[:12]
