"""The encoders that a recipe names, opened together; and the layouts that cannot hold what they tell a stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from if_jax.checkpoints import clip_files, release
from if_jax.checkpoints.cascade_folders import base_folder
from if_jax.checkpoints.stages import STAGE_NAMES, Encoders, StageDefaults, StageRelease
from if_jax.text.tokens import TEXT_LENGTH


def read_encoders(
    folder: str | Path, encoders: Sequence[str], clip_folder: str | Path = "", *, identify: bool = True
) -> Encoders:
    """Read the encoders of a recipe; T5's weights are `Lazy`.

    Args:
      folder: what T5 is read from, see `release.read_text_encoder`; "" where it is trained, or not read. Without
        `clip_folder` CLIP is read from there too.
      encoders: of `conditioning.ENCODERS`.
      clip_folder: transformers' folder of a CLIPModel.
      identify: as for `release.read_text_encoder`.

    Raises:
      FileNotFoundError: names what is missing.
      ValueError: weights and configuration do not fit.
    """
    t5 = release.read_text_encoder(folder, None, identify=identify) if folder and "t5" in encoders else None
    if not {"clip", "clip_image"}.intersection(encoders):
        return Encoders(t5)
    own = clip_folder or base_folder(Path(folder)) / clip_files.FOLDER
    return Encoders(t5, clip_files.read_clip_encoder(own, encoders))


def refuse_other_text(
    folder: str | Path, stages: Sequence[StageRelease], defaults: Sequence[StageDefaults], layout: str
) -> None:
    """Refuse to write stages in a layout whose pipelines do not tell them what they were trained on.

    Args:
      folder: that holds them, for the message.
      stages: in order.
      defaults: of a cascade.
      layout: "diffusers" or "deepfloyd".

    Raises:
      ValueError: names the stage and what it reads.
    """
    for name, stage in zip(STAGE_NAMES, stages, strict=False):
        if read := list(dict.fromkeys(part.encoder for part in stage.unet_config.text_parts)):
            raise ValueError(
                f"{folder}: stage {name} reads {' + '.join(read)}, and the {layout} layout holds a T5 alone: use the "
                "release as it is, with if_jax"
            )
    if defaults and (length := defaults[0].text_length) != TEXT_LENGTH:
        raise ValueError(
            f"{folder} reads captions of {length} tokens, and pipelines of the {layout} layout {TEXT_LENGTH}: use the "
            "release as it is, with if_jax"
        )
