"""What the stages are conditioned on: texts or text states, checked, encoded once, kept in files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from if_jax.checkpoints.files import atomic_file
from if_jax.inference.options import Options

EmbedCaptions = Callable[[Sequence[str]], np.ndarray]  # captions → text states (B, L, D)
LONGEST = 20_000  # characters; a text encoder reads 77 tokens, or some hundreds


@dataclass(frozen=True, eq=False)
class TextStates:
    """Text states (B, L, D) float32 of B pictures; `uncond` is what guidance draws away from."""

    text: np.ndarray
    empty: np.ndarray  # of the empty caption
    uncond: np.ndarray  # of the negative prompts, or of the empty caption
    style: np.ndarray | None = None


def encode_texts(
    prompt: str | Sequence[str] | None, options: Options, embed: EmbedCaptions, shape: tuple[int, int]
) -> TextStates:
    """Encode all texts of a request in one go; states that come in place of texts are checked.

    Args:
      prompt: one text for each picture, or None where `options` holds `prompt_embeds`.
      options: whose negative_prompt, style_prompt, prompt_embeds, negative_prompt_embeds and empty_embeds are read.
      embed: encodes captions; not called where there is no text.
      shape: (L, D) of the states.

    Raises:
      ValueError: for texts or states that cannot work, or do not fit one another.
    """
    prompt_states, negative_states = options.get("prompt_embeds"), options.get("negative_prompt_embeds")
    empty_states, negative_prompt = options.get("empty_embeds"), options.get("negative_prompt")
    if (prompt is None) == (prompt_states is None):
        raise ValueError("give either prompt or prompt_embeds, not both and not neither")
    if negative_prompt is not None and negative_states is not None:
        raise ValueError("give either negative_prompt or negative_prompt_embeds, not both")
    captions = {
        "prompt": _captions("prompt", prompt),
        "empty": [""] if empty_states is None else [],
        "negative": _captions("negative_prompt", negative_prompt),
        "style": _captions("style_prompt", options.get("style_prompt")),
    }
    every = [caption for group in captions.values() for caption in group]
    ends = np.cumsum([len(group) for group in captions.values()])[:-1]
    parts = np.split(embed(every), ends) if every else []
    states = {name: part for name, part in zip(captions, parts, strict=False) if len(part)}
    if prompt_states is not None:
        states["prompt"] = _checked_states("prompt_embeds", prompt_states, shape)
    if empty_states is not None:
        states["empty"] = _checked_states("empty_embeds", np.reshape(empty_states, (-1, *shape)), shape)
    if negative_states is not None:
        states["negative"] = _checked_states("negative_prompt_embeds", negative_states, shape)
    text = states["prompt"]
    empty = np.broadcast_to(states["empty"], text.shape)
    negative, style = states.get("negative"), states.get("style")
    return TextStates(
        text,
        empty,
        empty if negative is None else _single_or_each("negative prompts", negative, text.shape),
        None if style is None else _single_or_each("style prompts", style, text.shape),
    )


def save_embeds(path: str | Path, prompts: Sequence[str], states: np.ndarray, empty: np.ndarray) -> None:
    """Keep text states in a safetensors file, in float32, whole or not at all.

    Args:
      path: of the file; folders are made.
      prompts: the B texts.
      states: (B, L, D), theirs.
      empty: (L, D), those of the empty caption.
    """
    import json

    from safetensors.numpy import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"prompt_embeds": np.ascontiguousarray(states, np.float32)}
    tensors["empty_embeds"] = np.ascontiguousarray(empty, np.float32)
    with atomic_file(path) as beside:
        save_file(tensors, beside, metadata={"prompts": json.dumps(list(prompts))})


def load_embeds(path: str | Path) -> tuple[list[str], Options]:
    """Read what `save_embeds` has kept.

    Returns:
      The prompts, and `prompt_embeds` and `empty_embeds`, which `Cascade.dream` takes in their place.

    Raises:
      FileNotFoundError: where there is no file.
      ValueError: where it holds no text states.
    """
    import json

    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; `if-jax dream --save-embeds {path}` writes one")
    try:
        with safe_open(path, "numpy") as file:
            prompts = json.loads((file.metadata() or {})["prompts"])
            states, empty = (file.get_tensor(name) for name in ("prompt_embeds", "empty_embeds"))
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: holds no text states ({error})") from None
    return prompts, {"prompt_embeds": states, "empty_embeds": empty}


def _captions(word: str, texts: str | Sequence[str] | None) -> list[str]:
    """The texts as a list; ValueError for what is no text, or far too long for one."""
    if texts is None:
        return []
    captions = list(texts) if isinstance(texts, list | tuple) else [cast(str, texts)]
    if not captions:
        raise ValueError(f"{word} is empty: give at least one text")
    for number, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise ValueError(f"{word} holds {caption!r} ({type(caption).__name__}): give texts")
        if len(caption) > LONGEST:
            raise ValueError(
                f"{word} has a text of {len(caption)} characters, of which the first words are read: give {LONGEST} or "
                "fewer"
            )
        captions[number] = caption.encode("utf-8", "replace").decode()  # a stray byte, which UTF-8 lacks, is a "?"
    return captions


def _checked_states(word: str, states: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Text states (B, *shape) float32; ValueError where they are of another shape."""
    states = np.asarray(states, np.float32)
    if states.ndim != 3 or states.shape[1:] != shape or not len(states):
        raise ValueError(f"{word} has shape {states.shape}: expected (B, {shape[0]}, {shape[1]})")
    return states


def _single_or_each(word: str, states: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if len(states) not in (1, shape[0]):
        raise ValueError(f"{len(states)} {word} for {shape[0]} prompts: give one, or one for each")
    return np.broadcast_to(states, shape)
