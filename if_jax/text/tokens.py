"""Captions to token ids: UTF-8 bytes (ByT5) or SentencePiece (T5), 77 positions with IF's padding.

Both number the special tokens as T5 does: 0 pads on the right, 1 ends the text, 2 is unknown. A caption that does not
fit is cut so that the end-of-text token is always there, last. The ids equal those of transformers' `ByT5Tokenizer`
and `T5Tokenizer` with `padding="max_length", truncation=True, max_length=length`, so that a folder written by `save`
gives stock diffusers the same conditioning.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from if_jax.text.tokenizer_files import (
    EOS,
    PAD,
    TEXT_LENGTH,
    UNKNOWN,
    added_tokens,
    class_name_of,
    open_json,
    open_sentencepiece,
    save_config,
)

_LOG = logging.getLogger(__name__)
_T5_FILES = ("spiece.model", "tokenizer.json")
_BYTE_SENTINELS, _T5_SENTINELS = 125, 100


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
        if added:
            raise ValueError(_cannot_add(path, added, "bytes"))
        return ByteTokenizer()
    if name not in (None, "T5Tokenizer", "T5TokenizerFast"):
        raise ValueError(f'tokenizer "{source}" is a {name}: if_jax reads ByT5Tokenizer and T5Tokenizer folders')
    for file_name in reversed(_T5_FILES) if added else _T5_FILES:  # SentencePiece knows nothing of added tokens
        if (path / file_name).is_file():
            tokenizer = _open_t5(path / file_name)
            if lost := [token for token in added if tokenizer.token_id(token) != added[token]]:
                raise ValueError(_cannot_add(path / file_name, lost, "pieces"))
            return tokenizer
    raise FileNotFoundError(f'tokenizer folder "{source}" is incomplete: it needs {" or ".join(_T5_FILES)}')


@dataclass(frozen=True)
class ByteTokenizer:
    """One token per UTF-8 byte: id = byte + 3 (ByT5, arXiv:2105.13626). No vocabulary file, 384 ids.

    The last 125 ids are ByT5's sentinels; they and the special tokens occur only where a caption spells them out
    ("</s>", "<extra_id_0>"), which transformers reads as the tokens themselves.
    """

    _reported: set[int] = field(default_factory=set, repr=False, compare=False)  # lengths at which a cut was reported

    class_name = "ByT5Tokenizer"
    vocab_size = 384

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
            if "<" in caption and len(parts := _split_spelled(caption, _BYTE_SENTINELS)) > 1:
                tokens = _bytes_of_parts(parts)
                sizes[row] = len(tokens)
                ids[row], mask[row] = _fit(tokens, length, repeat_eos=False)
        _report_cut(captions, sizes > room, length, self._reported, always_warn)
        return ids, mask

    def pieces(self) -> list[str]:
        """See `Tokenizer.pieces`: bytes have no vocabulary of their own."""
        return [chr(code) for code in range(128)]

    def save(self, folder: str | Path) -> None:
        """Write tokenizer_config.json: ByT5 has no vocabulary to store."""
        save_config(Path(folder), self.class_name, _BYTE_SENTINELS)


@dataclass(frozen=True)
class T5Tokenizer:
    """SentencePiece unigram tokens of T5, from the bytes of a `spiece.model` or a `tokenizer.json`.

    The bytes travel with the object, so it pickles into data workers and `save` copies them unchanged.
    """

    model: bytes = field(repr=False)
    file_name: str  # which of the two files `model` is
    _reported: set[int] = field(default_factory=set, repr=False, compare=False)  # lengths at which a cut was reported

    class_name = "T5Tokenizer"

    @property
    def vocab_size(self) -> int:
        """Pieces and sentinels: 32,100 for the published T5 (whose embedding table is padded to 32,128 rows)."""
        if self.file_name == "tokenizer.json":
            return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        return self._backend.get_piece_size() + _T5_SENTINELS

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
        return sorted(word.replace("\u2581", " ") for word in words)

    def save(self, folder: str | Path) -> None:
        """Write the model file as it was read, and tokenizer_config.json."""
        save_config(Path(folder), self.class_name, _T5_SENTINELS)
        (Path(folder) / self.file_name).write_bytes(self.model)

    @cached_property
    def _backend(self) -> Any:
        return (open_json if self.file_name == "tokenizer.json" else open_sentencepiece)(self.model)

    def token_id(self, token: str) -> int | None:
        """The id of a token that a caption spells out; None where the caption's is cut to pieces instead."""
        return self._backend.token_to_id(token) if self.file_name == "tokenizer.json" else None

    def _ids_of_caption(self, caption: str) -> list[int]:
        """Ids without the end-of-text token. Split at spelled-out tokens here: SentencePiece knows nothing of them."""
        ids: list[int] = []
        for part in _split_spelled(caption, _T5_SENTINELS) if "<" in caption else [caption]:
            if isinstance(part, str):
                ids += self._ids_of_text(part.strip())
            else:  # sentinels count down from the end of the vocabulary
                ids.append(part if part >= 0 else self.vocab_size + part)
        return ids

    def _ids_of_text(self, text: str) -> list[int]:
        if self.file_name == "tokenizer.json":
            return self._backend.encode(_plain(text), add_special_tokens=False).ids
        return self._backend.encode(_plain(text))


def _plain(text: str) -> str:
    """Text with "?" for what UTF-8 cannot hold, such as a stray byte of a command line."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


_SPELLED = re.compile(r"\s*(<pad>|</s>|<unk>)\s*|<extra_id_(0|[1-9][0-9]*)>")


def _split_spelled(caption: str, sentinels: int) -> list[str | int]:
    """Cut a caption at the special tokens it spells out: text, or an id, or -1 - k for sentinel k.

    Spaces around the first three tokens are dropped, as transformers drops them.
    """
    parts: list[str | int] = []
    start = 0
    for match in _SPELLED.finditer(caption):
        name, sentinel = match.groups()
        if name is None and int(sentinel) >= sentinels:
            continue
        spelled = -1 - int(sentinel) if name is None else {"<pad>": PAD, "</s>": EOS, "<unk>": UNKNOWN}[name]
        parts += [caption[start : match.start()], spelled]
        start = match.end()
    return [*parts, caption[start:]]


def _bytes_of_parts(parts: Sequence[str | int]) -> list[int]:
    ids: list[int] = []
    for part in parts:
        if isinstance(part, str):
            ids += [byte + 3 for byte in part.encode("utf-8", errors="replace")]
        else:  # sentinels count up, straight after the bytes
            ids.append(part if part >= 0 else 3 + 256 - 1 - part)
    return ids


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


def _cannot_add(path: Path, tokens: Iterable[str], into: str) -> str:
    named = ", ".join(list(tokens)[:5])
    return (
        f'tokenizer "{path}": its added tokens {named} would be cut to {into}; open the folder with transformers, '
        "save it as a fast tokenizer (tokenizer.json), which keeps them, or leave the tokens out"
    )


def _open_t5(path: Path) -> T5Tokenizer:
    tokenizer = T5Tokenizer(path.read_bytes(), "tokenizer.json" if path.suffix == ".json" else "spiece.model")
    try:
        _ = tokenizer.vocab_size  # opens the model, so that a broken file is refused here
    except ValueError as error:
        raise ValueError(f'tokenizer file "{path}" {error}: give the file of a T5 model') from None
    return tokenizer
