"""New words of a text encoder (textual inversion, Gal et al. 2022, arXiv:2208.01618): tokens with rows of their own.

A word is a token added to the tokenizer and a row of the embedding table, at the word's id. Everything else in the
encoder stays as it is, and so do the states of captions without the word. Files hold word → row, as diffusers' textual
inversion writes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from if_jax.checkpoints.files import atomic_file
from if_jax.checkpoints.names import Params
from if_jax.checkpoints.stages import StageRelease, TextEncoder
from if_jax.checkpoints.tensors import Lazy, read_tensors
from if_jax.checkpoints.write_tensors import write_safetensors

FILE_NAME = "learned_embeds.safetensors"


def with_words(text: TextEncoder, words: Sequence[str], init: str = "") -> TextEncoder:
    """A text encoder with words that mean nothing of their own yet.

    Args:
      text: the encoder; it keeps its `sha256`.
      words: the new tokens.
      init: a text whose tokens' rows they all begin as the mean of; "": of all rows.

    Raises:
      ValueError: a word is a token already, or cannot be one.
    """
    first, table = text.tokenizer.vocab_size, text.params["shared"]["embedding"]
    tokenizer = text.tokenizer.with_words(words)

    def rows() -> np.ndarray:
        whole = np.asarray(table, np.float32)
        ids, mask = text.tokenizer([init])
        start = whole[ids[0, : mask.sum() - 1]] if init else whole[:first]  # without the end-of-text token
        return np.broadcast_to(start.mean(0), (len(words), whole.shape[1]))

    return replace(text, tokenizer=tokenizer, **_extended(text, first, len(words), rows))


def with_rows(text: TextEncoder, rows: Any) -> TextEncoder:
    """The encoder with the rows of its last words replaced.

    Args:
      text: of `with_words`.
      rows: (n, d_model), of its last n words.
    """
    first = text.tokenizer.vocab_size - len(rows)
    return replace(text, **_extended(text, first, len(rows), lambda: np.asarray(rows, np.float32)))


def word_rows(text: TextEncoder, count: int) -> np.ndarray:
    """The rows (count, d_model) float32 of the encoder's last words."""
    end = text.tokenizer.vocab_size
    return np.asarray(text.params["shared"]["embedding"], np.float32)[end - count : end]


def write_words(
    path: Path, rows: Mapping[str, np.ndarray], notes: Mapping[str, str] | None = None, *, overwrite: bool = False
) -> None:
    """Write words as a file, whole or not at all.

    Args:
      path: the file; its folder is made.
      rows: word → (d_model,).
      notes: what the header says besides.
      overwrite: replace a file that is there.

    Raises:
      ValueError: the file exists, or a value is not finite.
      OSError: the disk is full.
    """
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists already: choose another place or ask to overwrite it")
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {word: np.ascontiguousarray(row, np.float32) for word, row in rows.items()}
    specs = {word: (row.shape, "float32") for word, row in tensors.items()}
    with atomic_file(path) as beside:
        write_safetensors(beside, specs, iter(tensors.items()), {"format": "pt", **(notes or {})})


def read_words(path: str | Path) -> dict[str, np.ndarray]:
    """Read words of if_jax, or of diffusers' textual inversion.

    Args:
      path: a safetensors file, or the folder of its `learned_embeds.safetensors`.

    Returns:
      word → (d_model,) float32. Of several rows of a word the first has its name, others "_1", "_2", … behind it, as
      in diffusers.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it holds something else.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a file of new words, or the folder of its {FILE_NAME}")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: is no .safetensors file; give a file of new words")
    tensors, _ = read_tensors(path.parent, path.stem)
    rows: dict[str, np.ndarray] = {}
    for word, tensor in tensors.items():
        if len(tensor.shape) not in (1, 2) or 0 in tensor.shape:
            raise ValueError(f"{path}: holds {word} of shape {tensor.shape}, no row of an embedding table")
        for number, row in enumerate(np.asarray(tensor, np.float32).reshape(-1, tensor.shape[-1])):
            rows[f"{word}_{number}" if number else word] = row
    if not rows:
        raise ValueError(f"{path}: holds no words; give a file of new words")
    return rows


def with_word_files(stages: Sequence[StageRelease], files: Sequence[str | Path]) -> list[StageRelease]:
    """The stages of a cascade with the words of files in the text encoder of the first.

    Args:
      stages: in order, their parameters not on a device yet.
      files: see `read_words`.

    Raises:
      FileNotFoundError: names the file.
      ValueError: the encoder knows a word already, or is of another width; or there is no encoder.
    """
    changed = list(stages)
    for file in files:
        rows, base = read_words(file), changed[0]
        if base.text_config is None or base.text_params is None or base.tokenizer is None:
            raise ValueError(f"{file} holds words, but the first stage brings no text encoder to add them to")
        text = TextEncoder(base.text_config, base.text_params, base.tokenizer, "")
        for word, row in rows.items():
            if row.shape != (text.config.d_model,):
                raise ValueError(
                    f"{file}: the row of {word} is {row.shape[0]} wide, this text encoder's are {text.config.d_model}: "
                    "it was learned for another one"
                )
        try:
            text = with_rows(with_words(text, list(rows)), np.stack(list(rows.values())))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        changed[0] = replace(base, text_config=text.config, text_params=text.params, tokenizer=text.tokenizer)
    # The other stages read what they read before, but the encoder is another one by its content.
    return [replace(stage, text_encoder_sha256=None) for stage in changed] if files else changed


def _extended(text: TextEncoder, first: int, count: int, rows: Any) -> dict[str, Any]:
    """Configuration and parameters with `count` rows from `first` on, in the table or behind it, made when read."""
    table = text.params["shared"]["embedding"]
    size = max(table.shape[0], first + count)

    def read() -> np.ndarray:
        whole = np.zeros((size, table.shape[1]), np.dtype(table.dtype))
        whole[: table.shape[0]] = np.asarray(table)
        whole[first : first + count] = rows()
        return whole

    embedding = Lazy((size, table.shape[1]), np.dtype(table.dtype), read)
    params: Params = {**text.params, "shared": {"embedding": embedding}}
    return {"config": replace(text.config, vocab_size=size), "params": params}
