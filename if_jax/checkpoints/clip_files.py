"""The CLIP that a stage reads besides T5, or in its place: opened from the user's folder, kept beside a release.

STAGE/clip/   config.json, model.safetensors, tokenizer: the towers that are read, as transformers' CLIPModel has them
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from if_jax.checkpoints import names
from if_jax.checkpoints.feature_weights import CLIP_HASH, read_clip
from if_jax.checkpoints.files import write_json
from if_jax.checkpoints.stages import CLIPEncoder
from if_jax.checkpoints.tensors import BytesWritten, Storage
from if_jax.checkpoints.weights import content_sha256
from if_jax.checkpoints.write_tensors import write_tensors
from if_jax.models.conditioning import CLIPShapes
from if_jax.text.clip_tokens import load_clip_tokenizer

FOLDER = "clip"  # in a stage
_TOWERS = {"clip": "text", "clip_image": "vision"}


def read_clip_encoder(folder: str | Path, encoders: Sequence[str] | None = None) -> CLIPEncoder:
    """Open a CLIP as stages read it.

    Args:
      folder: transformers' folder of a CLIPModel, or FOLDER of a stage.
      encoders: which of `conditioning.ENCODERS` are read; None: those that FOLDER of a stage holds.

    Raises:
      FileNotFoundError: names what is missing.
      ValueError: another kind of network, without what is to be read, or damaged.
    """
    folder = Path(folder)
    towers = ("text", "vision")
    opened = read_clip(
        folder,
        tuple(_TOWERS[name] for name in encoders if name in _TOWERS) if encoders else towers,
        optional=encoders is None,
    )
    text, vision = opened.text, opened.vision
    params = {name: tower[1] for name, tower in (("clip_text", text), ("clip_vision", vision)) if tower}
    tokenizer = None
    if text:
        tokenizer = load_clip_tokenizer(folder, text[0].max_position_embeddings)
        if (last := tokenizer.end_id) >= text[0].vocab_size:
            raise ValueError(f"{folder}: the tokenizer's end mark is {last}, the table has {text[0].vocab_size} rows")
    shapes = CLIPShapes(text[0] if text else None, vision[0] if vision else None, opened.mean, opened.std)
    return CLIPEncoder(shapes, params, tokenizer, opened.identity or content_sha256(params, "clip"))


def write_clip_encoder(folder: Path, clip: CLIPEncoder, storage: Storage, progress: BytesWritten | None = None) -> None:
    """Write the towers that are read as one folder, which `read_clip_encoder` and transformers open.

    Args:
      folder: where they go; it is made.
      clip: the encoder.
      storage: precision and shards.
      progress: called with the bytes written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shapes, tensors = clip.shapes, {}
    for params in clip.params.values():
        tensors |= names.lazy_torch(params, "clip")
    specs = {name: (tensor.shape, storage.dtype or "float32") for name, tensor in tensors.items()}
    write_tensors(
        folder, "model", specs, iter(tensors.items()), {"format": "pt", CLIP_HASH: clip.sha256}, storage, progress
    )
    config: dict[str, Any] = {"model_type": "clip", "architectures": ["CLIPModel"]}
    for key, tower in (("text_config", shapes.text), ("vision_config", shapes.vision)):
        if tower is not None:
            config |= {key: asdict(tower), "projection_dim": tower.projection_dim}
    write_json(folder / "config.json", config)
    statistics = {"image_mean": list(shapes.mean), "image_std": list(shapes.std)}
    write_json(folder / "preprocessor_config.json", statistics)
    if clip.tokenizer:
        clip.tokenizer.save(folder)
