"""What the stages are told: texts or text states, checked, encoded once, kept in files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Embed = Callable[[Sequence[str]], np.ndarray]  # captions → text states (B, L, D)
LONGEST = 20_000  # characters; a text encoder reads 77 tokens


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Text states (B, L, D) float32 of B pictures; `uncond` is what guidance draws away from."""

    text: np.ndarray
    empty: np.ndarray  # of the empty caption
    uncond: np.ndarray  # of the negative prompts, or of the empty caption
    style: np.ndarray | None = None


@dataclass(frozen=True)
class Texts:
    """What a user gives: of each, texts or their states."""

    prompt: str | Sequence[str] | None = None
    negative_prompt: str | Sequence[str] | None = None
    style_prompt: str | Sequence[str] | None = None
    prompt_embeds: np.ndarray | None = None
    negative_prompt_embeds: np.ndarray | None = None
    empty_embeds: np.ndarray | None = None  # (L, D) or (1, L, D): with these and no texts, no encoder is needed


def condition(texts: Texts, embed: Embed, shape: tuple[int, int]) -> Conditioning:
    """Encode all texts in one go. shape (L, D): of the states. Raises ValueError where what is given cannot work."""
    if (texts.prompt is None) == (texts.prompt_embeds is None):
        raise ValueError("give either prompt or prompt_embeds, not both and not neither")
    if texts.negative_prompt is not None and texts.negative_prompt_embeds is not None:
        raise ValueError("give either negative_prompt or negative_prompt_embeds, not both")
    groups = {
        "prompt": captions_of("prompt", texts.prompt),
        "empty": [""] if texts.empty_embeds is None else [],
        "negative_prompt": captions_of("negative_prompt", texts.negative_prompt),
        "style_prompt": captions_of("style_prompt", texts.style_prompt),
    }
    every = [caption for group in groups.values() for caption in group]
    states = np.split(embed(every), np.cumsum([len(group) for group in groups.values()])[:-1]) if every else [None] * 4
    text, empty, negative, style = (rows if rows is not None and len(rows) else None for rows in states)
    text = states_of("prompt_embeds", texts.prompt_embeds, shape) if text is None else text
    empty = states_of("empty_embeds", np.reshape(texts.empty_embeds, (-1, *shape)), shape) if empty is None else empty
    if texts.negative_prompt_embeds is not None:
        negative = states_of("negative_prompt_embeds", texts.negative_prompt_embeds, shape)
    empty = np.broadcast_to(empty, text.shape)
    return Conditioning(
        text,
        empty,
        empty if negative is None else _one_or_each("negative prompts", negative, text.shape),
        None if style is None else _one_or_each("style prompts", style, text.shape),
    )


def captions_of(word: str, given: str | Sequence[str] | None) -> list[str]:
    """The texts given, as a list; ValueError for what is no text, or far too long for one."""
    if given is None:
        return []
    captions = list(given) if isinstance(given, list | tuple) else [given]
    if not captions:
        raise ValueError(f"{word} is empty: give at least one text")
    for caption in captions:
        if not isinstance(caption, str):
            raise ValueError(f"{word} holds {caption!r} ({type(caption).__name__}): give texts")
        if len(caption) > LONGEST:
            raise ValueError(
                f"{word} has a text of {len(caption)} characters: 77 tokens are read, give {LONGEST} or fewer"
            )
    return captions


def states_of(word: str, given: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Text states (B, *shape) float32; ValueError where they are of another shape."""
    states = np.asarray(given, np.float32)
    if states.ndim != 3 or states.shape[1:] != shape or not len(states):
        raise ValueError(f"{word} has shape {states.shape}: expected (B, {shape[0]}, {shape[1]})")
    return states


def save_embeds(path: str | Path, prompts: Sequence[str], states: np.ndarray, empty: np.ndarray) -> None:
    """Keep text states (B, L, D), and those of the empty caption (L, D), in a safetensors file, in float32.

    Written beside and renamed, so that a file is whole or not there.
    """
    import json

    from safetensors.numpy import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    tensors = {"prompt_embeds": np.ascontiguousarray(states, np.float32)}
    tensors["empty_embeds"] = np.ascontiguousarray(empty, np.float32)
    try:
        save_file(tensors, beside, metadata={"prompts": json.dumps(list(prompts))})
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def load_embeds(path: str | Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """What `save_embeds` has kept: the prompts, and the arguments that `Cascade.dream` takes in their place."""
    import json

    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; `if-jax dream --save-embeds {path}` writes one")
    try:
        with safe_open(path, "numpy") as file:
            prompts = json.loads((file.metadata() or {})["prompts"])
            return prompts, {name: file.get_tensor(name) for name in ("prompt_embeds", "empty_embeds")}
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: holds no text states ({error})") from None


def _one_or_each(word: str, states: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if len(states) not in (1, shape[0]):
        raise ValueError(f"{len(states)} {word} for {shape[0]} prompts: give one, or one for each")
    return np.broadcast_to(states, shape)
