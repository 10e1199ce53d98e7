"""A CLIP of one layer with random weights, in the files that transformers keeps; it knows nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from if_jax.checkpoints.clip_files import write_clip_encoder
from if_jax.checkpoints.stages import CLIPEncoder
from if_jax.checkpoints.tensors import Storage
from if_jax.checkpoints.weights import abstract_params
from if_jax.models.clip import CLIPTextConfig, CLIPVisionConfig
from if_jax.models.conditioning import CLIPShapes
from if_jax.text.clip_tokens import CLIPTokenizer

_LETTERS = [chr(code) for code in range(33, 127)]
_PAIRS = [("r", "e"), ("re", "d</w>"), ("c", "u"), ("b", "e</w>"), ("cu", "be</w>")]
WORDS = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS), *map("".join, _PAIRS)]
WORDS += ["<|startoftext|>", "<|endoftext|>"]
_SIZE: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = CLIPTextConfig(
    vocab_size=len(WORDS), max_position_embeddings=12, eos_token_id=len(WORDS) - 1, projection_dim=8, **_SIZE
)
VISION = CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=8, **_SIZE)


def tokenizer() -> CLIPTokenizer:
    """Single letters and a few joined ones."""
    vocabulary = json.dumps({word: number for number, word in enumerate(WORDS)})
    merges = "#version: 0.2\n" + "".join(f"{first} {second}\n" for first, second in _PAIRS)
    return CLIPTokenizer(vocabulary.encode(), merges.encode(), length=TEXT.max_position_embeddings)


def write(folder: Path, seed: int = 0) -> Path:
    """Writes it; that folder."""
    rng = np.random.default_rng(seed)
    params = {
        name: jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), abstract_params(config))
        for name, config in (("clip_text", TEXT), ("clip_vision", VISION))
    }
    shapes = CLIPShapes(TEXT, VISION, (0.5, 0.5, 0.5), (0.3, 0.3, 0.3))
    write_clip_encoder(folder, CLIPEncoder(shapes, params, tokenizer(), f"{seed}" * 64), Storage())
    return folder
