"""Captions to token ids: UTF-8 bytes (ByT5) or SentencePiece (T5), 77 positions with IF's padding.

Both number the special tokens as T5 does: 0 pads on the right, 1 ends the text, 2 is unknown. A caption that does not
fit is cut so that the end-of-text token is always there, last. The ids equal those of transformers' `ByT5Tokenizer`
and `T5Tokenizer` with `padding="max_length", truncation=True, max_length=length`, so that a folder written by `save`
gives stock diffusers the same conditioning.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from if_jax.text.spelled import bytes_of_parts, check_words, plain, split_spelled, token_id
from if_jax.text.tokenizer_files import (
    EOS,
    PAD,
    TEXT_LENGTH,
    added_tokens,
    class_name_of,
    json_with_tokens,
    open_json,
    open_sentencepiece,
    save_config,
)

_LOG = logging.getLogger(__name__)
_T5_FILES = ("spiece.model", "tokenizer.json")
_BYTE_SENTINELS, _T5_SENTINELS = 125, 100
_BYTES_END = 3 + 256  # the special tokens and the bytes


class Tokenizer(Protocol):
    """What training, inference and release need of a tokenizer."""

    @property
    def class_name(self) -> str:
        """Name of the transformers class that opens the saved folder, for model_index.json."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that can occur."""
        ...

    def __call__(
        self, captions: Sequence[str], length: int = TEXT_LENGTH, *, always_warn: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and mask, both int32 (B, length); the mask is 1 up to and including the end-of-text token."""
        ...

    def pieces(self) -> list[str]:
        """Texts that together use the whole vocabulary: two tokenizers that cut them alike are the same."""
        ...

    def with_words(self, words: Sequence[str]) -> Tokenizer:
        """The tokenizer with further words as tokens of their own; their ids begin at `vocab_size`.

        Raises:
          ValueError: a word is a token already, or cannot be one.
        """
        ...

    def save(self, folder: str | Path) -> None:
        """Write a tokenizer folder that `load_tokenizer` and transformers open."""
        ...


def load_tokenizer(source: str | Path) -> ByteTokenizer | T5Tokenizer:
    """Open a tokenizer.

    Args:
      source: the word "bytes", a tokenizer folder, or a spiece.model or tokenizer.json file.

    Raises:
      FileNotFoundError: there is nothing to open.
      ValueError: a tokenizer of another family, or a damaged file.
    """
    if str(source) == "bytes":
        return ByteTokenizer()
    path = Path(source)
    if path.is_file():
        return _open_t5(path)
    if not path.is_dir():
        raise FileNotFoundError(
            f'tokenizer "{source}" does not exist: give "bytes", a tokenizer folder or spiece.model'
        )
    name, added = class_name_of(path / "tokenizer_config.json"), added_tokens(path)
    if name == "ByT5Tokenizer":
        return _with_added(path, ByteTokenizer(), added, "bytes")
    if name not in (None, "T5Tokenizer", "T5TokenizerFast"):
        raise ValueError(f'tokenizer "{source}" is a {name}: if_jax reads ByT5Tokenizer and T5Tokenizer folders')
    for file_name in reversed(_T5_FILES) if added else _T5_FILES:  # tokenizer.json may hold some of the added tokens
        if (path / file_name).is_file():
            return _with_added(path / file_name, _open_t5(path / file_name), added, "pieces")
    raise FileNotFoundError(f'tokenizer folder "{source}" is incomplete: it needs {" or ".join(_T5_FILES)}')


@dataclass(frozen=True)
class ByteTokenizer:
    """One token per UTF-8 byte: id = byte + 3 (ByT5, arXiv:2105.13626). No vocabulary file, 384 ids.

    The last 125 ids are ByT5's sentinels; they and the special tokens occur only where a caption spells them out
    ("</s>", "<extra_id_0>"), which transformers reads as the tokens themselves.
    """

    words: tuple[str, ...] = ()  # added, by id
    _reported: set[int] = field(default_factory=set, repr=False, compare=False)  # lengths at which a cut was reported

    class_name = "ByT5Tokenizer"

    @property
    def vocab_size(self) -> int:
        """Special tokens, bytes, sentinels and added words."""
        return _BYTES_END + _BYTE_SENTINELS + len(self.words)

    def __call__(
        self, captions: Sequence[str], length: int = TEXT_LENGTH, *, always_warn: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokenize captions; this runs once per training batch, so whole batches go through NumPy.

        Args:
          captions: any text; a character that UTF-8 cannot hold (a lone surrogate) becomes "?".
          length: positions of a row, the end-of-text token included.
          always_warn: report captions that lose their end each time, not only once per tokenizer.

        Returns:
          ids and mask, both int32 (B, length).

        Raises:
          ValueError: `captions` is one string, or `length` below 1.
        """
        _check(captions, length)
        encoded = [caption.encode("utf-8", errors="replace") for caption in captions]
        sizes = np.array([len(row) for row in encoded], np.int64)  # (B,), without the end-of-text token
        room = length - 1
        joined = b"".join([row[:room].ljust(length, b"\0") for row in encoded])
        ids = np.frombuffer(joined, np.uint8).reshape(len(encoded), length).astype(np.int32) + 3  # (B, length)
        ends = np.minimum(sizes, room)[:, None]  # (B, 1)
        position = np.arange(length)
        ids = np.where(position < ends, ids, np.where(position == ends, EOS, PAD)).astype(np.int32)
        mask = (position <= ends).astype(np.int32)
        for row, caption in enumerate(captions):
            spells = "<" in caption or any(word in caption for word in self.words)
            if spells and len(parts := split_spelled(caption, _BYTE_SENTINELS, self.words)) > 1:
                tokens = bytes_of_parts(parts, _BYTES_END)
                sizes[row] = len(tokens)
                ids[row], mask[row] = _fit(tokens, length, repeat_eos=False)
        _report_cut(captions, sizes > room, length, self._reported, always_warn)
        return ids, mask

    def pieces(self) -> list[str]:
        """See `Tokenizer.pieces`: bytes have no vocabulary of their own."""
        return [chr(code) for code in range(128)] + list(self.words)

    def with_words(self, words: Sequence[str]) -> ByteTokenizer:
        """See `Tokenizer.with_words`."""
        check_words(self, words)
        return replace(self, words=(*self.words, *words))

    def save(self, folder: str | Path) -> None:
        """Write tokenizer_config.json: ByT5 has no vocabulary to store but added words."""
        save_config(Path(folder), self.class_name, _BYTE_SENTINELS, _numbered(self), _BYTES_END)


@dataclass(frozen=True)
class T5Tokenizer:
    """SentencePiece unigram tokens of T5, from the bytes of a `spiece.model` or a `tokenizer.json`.

    The bytes travel with the object, so it pickles into data workers and `save` copies them unchanged.
    """

    model: bytes = field(repr=False)
    file_name: str  # which of the two files `model` is
    words: tuple[str, ...] = ()  # added beside a spiece.model, by id
    _reported: set[int] = field(default_factory=set, repr=False, compare=False)  # lengths at which a cut was reported

    class_name = "T5Tokenizer"

    @property
    def vocab_size(self) -> int:
        """Pieces and sentinels: 32,100 for the published T5 (whose embedding table is padded to 32,128 rows)."""
        if self.file_name == "tokenizer.json":
            return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        return self._backend.get_piece_size() + _T5_SENTINELS + len(self.words)

    def __call__(
        self, captions: Sequence[str], length: int = TEXT_LENGTH, *, always_warn: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokenize captions; arguments, results and errors are those of `ByteTokenizer`.

        Outer spaces are dropped first: SentencePiece ignores them, while some tokenizer.json files emit a token.
        """
        _check(captions, length)
        rows = [self._ids_of_caption(caption) for caption in captions]
        ids, mask = np.zeros((2, len(rows), length), np.int32)
        for number, row in enumerate(rows):
            ids[number], mask[number] = _fit(row, length, repeat_eos=True)
        _report_cut(captions, np.array([len(row) >= length for row in rows], bool), length, self._reported, always_warn)
        return ids, mask

    def pieces(self) -> list[str]:
        """See `Tokenizer.pieces`."""
        if self.file_name == "tokenizer.json":
            words = self._backend.get_vocab(with_added_tokens=True)
        else:
            words = [self._backend.id_to_piece(i) for i in range(self._backend.get_piece_size())]
        return sorted(word.replace("\u2581", " ") for word in [*words, *self.words])

    def with_words(self, words: Sequence[str]) -> T5Tokenizer:
        """See `Tokenizer.with_words`. They go into a tokenizer.json, and beside a spiece.model."""
        check_words(self, words)
        if self.file_name == "tokenizer.json":
            return replace(self, model=json_with_tokens(self.model, words, self.vocab_size))
        return replace(self, words=(*self.words, *words))

    def save(self, folder: str | Path) -> None:
        """Write the model file as it was read, and tokenizer_config.json."""
        save_config(Path(folder), self.class_name, _T5_SENTINELS, _numbered(self))
        (Path(folder) / self.file_name).write_bytes(self.model)

    @cached_property
    def _backend(self) -> Any:
        return (open_json if self.file_name == "tokenizer.json" else open_sentencepiece)(self.model)

    def _ids_of_caption(self, caption: str) -> list[int]:
        """Ids without the end-of-text token. Split at spelled-out tokens here: SentencePiece knows nothing of them."""
        ids: list[int] = []
        for part in split_spelled(caption, _T5_SENTINELS, self.words):
            if isinstance(part, str):
                ids += self._ids_of_text(part.strip())
            elif part >= 0:
                ids.append(part)
            else:
                ids.append(self._id_of_spelled(-1 - part))
        return ids

    def _id_of_spelled(self, number: int) -> int:
        """Sentinels count down from where the added words begin, and those, numbered on from 100, up from there."""
        if self.file_name == "tokenizer.json":
            named = self._backend.token_to_id(f"<extra_id_{number}>")
            return self.vocab_size - 1 - number if named is None else named
        published = self.vocab_size - len(self.words)
        return published + (number - _T5_SENTINELS if number >= _T5_SENTINELS else -1 - number)

    def _ids_of_text(self, text: str) -> list[int]:
        if self.file_name == "tokenizer.json":
            return self._backend.encode(plain(text), add_special_tokens=False).ids
        return self._backend.encode(plain(text))


def _fit(tokens: Sequence[int], length: int, *, repeat_eos: bool) -> tuple[np.ndarray, np.ndarray]:
    """One row of ids and mask, (length,) int32: cut, end of text, padding.

    Where a caption already ends in a spelled-out end of text, transformers' T5 repeats it and ByT5 does not.
    """
    kept = list(tokens[: length - 1])
    if repeat_eos or not kept or kept[-1] != EOS:
        kept.append(EOS)
    padding = length - len(kept)
    ids = np.array(kept + [PAD] * padding, np.int32)
    return ids, np.array([1] * len(kept) + [0] * padding, np.int32)


def _check(captions: Sequence[str], length: int) -> None:
    if isinstance(captions, str):
        raise ValueError(f"captions is one string, {captions[:40]!r}: give a list of strings")
    if length < 1:
        raise ValueError(f"text length is {length}: it must be at least 1, for the end-of-text token")


def _report_cut(captions: Sequence[str], cut: np.ndarray, length: int, reported: set[int], always: bool) -> None:
    """Log one line for captions that lost their end, `cut` (B,) bool; later batches of a training run stay silent."""
    count = int(np.sum(cut))
    if not count or (length in reported and not always):
        return
    reported.add(length)
    first = captions[int(np.argmax(cut))]
    _LOG.warning(
        "%d of %d captions are longer than %d tokens and lose their end, first: %r%s",
        count,
        len(captions),
        length,
        first if len(first) <= 60 else first[:60] + "...",
        "" if always else " (later ones are cut without a word)",
    )


def _with_added(
    path: Path, tokenizer: ByteTokenizer | T5Tokenizer, added: Mapping[str, int], into: str
) -> ByteTokenizer | T5Tokenizer:
    """The tokenizer of a folder with the tokens that were added there, by their ids.

    Raises:
      ValueError: one has another id than it would have here, or cannot be read out of a caption.
    """
    missing = sorted((number, token) for token, number in added.items() if token_id(tokenizer, token) != number)
    words = [token for _, token in missing]
    if not words:
        return tokenizer
    try:
        extended = tokenizer.with_words(words)
    except ValueError as error:
        raise ValueError(f'tokenizer "{path}": {error}') from None
    if [number for number, _ in missing] != list(range(tokenizer.vocab_size, extended.vocab_size)):
        named = ", ".join(words[:5])
        raise ValueError(
            f'tokenizer "{path}": its added tokens {named} would be cut to {into}, since their ids do not follow on '
            f"{tokenizer.vocab_size - 1}; open the folder with transformers, save it as a fast tokenizer "
            "(tokenizer.json), which keeps them, or leave the tokens out"
        )
    return extended


def _numbered(tokenizer: ByteTokenizer | T5Tokenizer) -> dict[str, int]:
    """The added words with their ids, the last of the vocabulary."""
    first = tokenizer.vocab_size - len(tokenizer.words)
    return {word: first + number for number, word in enumerate(tokenizer.words)}


def _open_t5(path: Path) -> T5Tokenizer:
    tokenizer = T5Tokenizer(path.read_bytes(), "tokenizer.json" if path.suffix == ".json" else "spiece.model")
    try:
        _ = tokenizer.vocab_size  # opens the model, so that a broken file is refused here
    except ValueError as error:
        raise ValueError(f'tokenizer file "{path}" {error}: give the file of a T5 model') from None
    return tokenizer
