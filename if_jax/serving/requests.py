"""What may be asked of the server, checked before it is queued: a request becomes a plan, or one line of refusal."""

from __future__ import annotations

import base64
import binascii
import secrets
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from if_jax.checkpoints.stages import STAGE_NAMES
from if_jax.data.preprocessing import open_picture
from if_jax.inference import modes
from if_jax.inference.cascade import Cascade
from if_jax.inference.inputs import read_mask, read_picture
from if_jax.inference.modes import ModePlan
from if_jax.inference.options import Options
from if_jax.inference.settings import StageSettings

Mode = Literal["dream", "style_transfer", "super_resolution", "inpainting"]
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")


@dataclass(frozen=True)
class Limits:
    """What one request, and all that wait, may take."""

    upload_bytes: int = 20_000_000  # of one request's body
    pixels: int = 16_000_000  # of a picture that comes with a request
    prompt: int = 2_000  # characters
    pictures: int = 8  # of one request
    steps: int = 300  # of a picture, over its stages
    queue: int = 256  # pictures that wait
    queue_of_client: int = 64  # … of one token, or of one address
    kept_bytes: int = 512_000_000  # of finished pictures in memory
    kept_seconds: int = 1800  # that they are kept


class Refused(Exception):
    """A request that is not drawn: the HTTP status, and one line that says why."""

    def __init__(self, status: int, message: str, retry_after: int = 0) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after


class DrawRequest(BaseModel):
    """One request; what is left out is as the cascade's own defaults have it."""

    model_config = ConfigDict(extra="forbid")

    mode: Mode = "dream"
    prompt: str = Field(default="", description="what to draw; of super_resolution what the picture shows")
    negative_prompt: str = Field(default="", description="what to draw away from")
    style_prompt: str = Field(default="", description="IF's style, pooled in place of the prompt")
    seed: int | None = Field(default=None, ge=0, lt=2**32, description="without: drawn at random, and returned")
    pictures: int = Field(default=1, ge=1, description="numbers 0, 1, … of the seed")
    aspect_ratio: str = Field(default="1:1", description="width:height, of dream")
    stages: int | None = Field(default=None, ge=1, description="draw only so many")
    stage: str = Field(default="II", description="of super_resolution: the first that draws")
    settings: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description='words of each stage, as if_I_kwargs: {"I": {"guidance_scale": 2, "num_inference_steps": 10}}',
    )
    image: str = Field(default="", description="base64 of a PNG, JPEG or WebP: what is drawn over, or enlarged")
    mask: str = Field(default="", description="of inpainting: base64, of the picture's size, white where to draw")


@dataclass(frozen=True, eq=False)
class DrawPlan:
    """A request that can be drawn.

    Attributes:
      mode: name of the method of `Cascade`.
      prompt, negative, style: its texts.
      seed: of its pictures.
      count: of its pictures.
      arguments: of the method, besides texts, pictures and what tells pictures apart.
      image, mask: pictures that came with it.
      batch: equal for requests that may be drawn in one program at a time.
      program: equal for requests that need the same compiled programs.
      stages: names of the stages that draw.
      steps: of a picture, over its stages.
      settings: what a PNG says of how it was drawn.
    """

    mode: Mode
    prompt: str
    negative: str
    style: str
    seed: int
    count: int
    arguments: dict[str, Any]
    image: Image.Image | None
    mask: Image.Image | None
    batch: Any
    program: Any
    stages: tuple[str, ...]
    steps: int
    settings: dict[str, Any]


def plan_request(cascade: Cascade, request: DrawRequest, limits: Limits) -> DrawPlan:
    """Checks everything of a request.

    Args:
      cascade: that draws it.
      request: what is asked.
      limits: of the server.

    Raises:
      Refused: with one line; nothing was drawn.
    """
    for word in ("prompt", "negative_prompt", "style_prompt"):
        if len(text := getattr(request, word)) > limits.prompt:
            raise Refused(422, f"{word} has {len(text)} characters: give {limits.prompt} or fewer")
    if request.pictures > limits.pictures:
        raise Refused(422, f"pictures is {request.pictures}: this server draws {limits.pictures} a request")
    if not request.prompt and request.mode != "super_resolution" and not request.style_prompt:
        raise Refused(422, "prompt is empty: say what to draw")
    needs = {"style_transfer": ("image",), "super_resolution": ("image",), "inpainting": ("image", "mask")}
    for word in ("image", "mask"):
        wanted = word in needs.get(request.mode, ())
        if wanted != bool(getattr(request, word)):
            message = f"{word} is missing: {request.mode} needs one" if wanted else f"{request.mode} takes no {word}"
            raise Refused(422, message)
    image = _decode("image", request.image, limits) if request.image else None
    mask = _decode("mask", request.mask, limits) if request.mask else None
    words = {f"if_{name}_kwargs": dict(kwargs) for name, kwargs in request.settings.items() if kwargs}
    if unknown := set(request.settings) - set(STAGE_NAMES[: len(cascade.stages)]):
        own = ", ".join(STAGE_NAMES[: len(cascade.stages)])
        raise Refused(422, f"settings has stage {sorted(unknown)[0]!r}: this cascade has {own}")
    options: Any = {"stages": request.stages, **words}
    if request.negative_prompt:
        options["negative_prompt"] = request.negative_prompt
    if request.style_prompt:
        options["style_prompt"] = request.style_prompt
    try:
        plan = _mode_plan(cascade, request, image, mask)
        settings = modes.stage_settings_of(plan, cascade.stages, cascade.defaults, Options(**options))
    except (ValueError, TypeError, OverflowError) as error:
        raise Refused(422, " ".join(str(error).split())) from None
    steps = sum(each.first_index + 1 if plan.supports else len(each.timesteps) for each in settings)
    if steps > limits.steps:
        raise Refused(422, f"{steps} steps a picture: this server takes {limits.steps}")
    arguments: dict[str, Any] = {"stages": request.stages, **words}
    if request.mode == "dream":
        arguments["aspect_ratio"] = request.aspect_ratio
    if request.mode == "super_resolution":
        arguments["stage"] = request.stage
    styled = bool(request.style_prompt)
    shape = (request.mode, plan.sizes, plan.first, styled)
    seed = secrets.randbelow(2**32) if request.seed is None else request.seed
    noted = {**arguments, "seed": seed}
    noted |= {word: options.get(word) for word in ("negative_prompt", "style_prompt")}
    return DrawPlan(
        request.mode,
        request.prompt,
        request.negative_prompt,
        request.style_prompt,
        seed,
        request.pictures,
        arguments,
        image,
        mask,
        (*shape, tuple(settings)),
        (*shape, tuple(map(_compiled_for, settings))),
        STAGE_NAMES[plan.first : plan.first + len(plan.sizes)],
        steps,
        noted,
    )


def _mode_plan(cascade: Cascade, request: DrawRequest, image: Image.Image | None, mask: Image.Image | None) -> ModePlan:
    stages = cascade.stages
    if image is None:
        return modes.plan_dream(stages, request.aspect_ratio, request.stages)
    if request.mode == "super_resolution":
        return modes.plan_super_resolution(stages, [image], request.stage, request.stages)
    return modes.plan_drawn_over(stages, [image], None if mask is None else [mask], request.stages)


def _compiled_for(settings: StageSettings) -> tuple[Any, ...]:
    """What of the settings asks for another compiled program, see `denoise_stage`."""
    changed = (settings.guidance_interval is not None, settings.apg is not None, settings.clipped_eps)
    return settings.sampler, settings.guided, changed, settings.scheduler.variance_type


def _decode(word: str, text: str, limits: Limits) -> Image.Image:
    """A picture from base64, perhaps a data URL; its size is known before its pixels are made."""
    try:
        content = base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError):
        raise Refused(422, f"{word} is no base64") from None
    return decode_picture(word, content, limits)


def decode_picture(word: str, content: bytes, limits: Limits) -> Image.Image:
    """A picture that came with a request.

    Args:
      word: what to call it.
      content: of the file.
      limits: of the server.

    Raises:
      Refused: it is none, is damaged, or has too many pixels.
    """
    if not content:
        raise Refused(422, f"{word} has 0 bytes")
    try:
        with open_picture(content) as picture:
            if picture.format not in _FORMATS:
                raise Refused(422, f"{word} is {picture.format}: give a PNG, JPEG or WebP")
            width, height = picture.size
            if width * height > limits.pixels:
                raise Refused(413, f"{word} is {width}x{height}: this server takes {limits.pixels:,} pixels")
            picture.load()
            read = read_mask(picture, picture.size, word) if word == "mask" else read_picture(picture, word)
    except Refused:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Refused(413, f"{word} is enormous: this server takes {limits.pixels:,} pixels") from None
    except ValueError as error:
        raise Refused(422, " ".join(str(error).split())) from None
    except Exception:  # whatever a decoder makes of hostile bytes
        raise Refused(422, f"{word} is no picture that can be read: give a PNG, JPEG or WebP") from None
    assert isinstance(read, Image.Image) and np.all(np.array(read.size) > 0)
    return read
