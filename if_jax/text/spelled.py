"""Tokens that a caption spells out: "</s>", "<extra_id_0>", and words that were added to a vocabulary."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

import numpy as np

from if_jax.text.tokenizer_files import EOS, PAD, TEXT_LENGTH, UNKNOWN

Cut = Callable[[Sequence[str], int], tuple[np.ndarray, np.ndarray]]  # captions, length -> ids and mask
_PUBLISHED = r"\s*(<pad>|</s>|<unk>)\s*|<extra_id_(0|[1-9][0-9]*)>"


def split_spelled(caption: str, sentinels: int, words: tuple[str, ...] = ()) -> list[str | int]:
    """Cut a caption at the tokens it spells out.

    Spaces around the first three are dropped, as transformers drops them. A word is found wherever it stands, the
    longest first, also within another.

    Args:
      caption: the text.
      sentinels: how many the vocabulary has.
      words: that were added to it.

    Returns:
      Texts, ids, -1 - k for sentinel k, and -1 - sentinels - k for word k.
    """
    parts: list[str | int] = []
    start = 0
    for match in _pattern(words).finditer(caption):
        name, sentinel, word = match.groups()
        if word is not None:
            spelled = -1 - sentinels - words.index(word)
        elif name is not None:
            spelled = {"<pad>": PAD, "</s>": EOS, "<unk>": UNKNOWN}[name]
        elif int(sentinel) < sentinels:
            spelled = -1 - int(sentinel)
        else:
            continue
        parts += [caption[start : match.start()], spelled]
        start = match.end()
    return [*parts, caption[start:]]


def bytes_of_parts(parts: Sequence[str | int], first: int) -> list[int]:
    """Ids of ByT5.

    Args:
      parts: of `split_spelled`.
      first: id of sentinel 0; sentinels count up, and the added words follow them.
    """
    ids: list[int] = []
    for part in parts:
        if isinstance(part, str):
            ids += [byte + 3 for byte in part.encode("utf-8", errors="replace")]
        else:
            ids.append(part if part >= 0 else first - 1 - part)
    return ids


def plain(text: str) -> str:
    """Text with "?" for what UTF-8 cannot hold, such as a stray byte of a command line."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def token_id(tokenizer: Cut, token: str) -> int | None:
    """The id of a token that a caption spells out; None where the caption's is cut to pieces instead."""
    ids, mask = tokenizer([token], TEXT_LENGTH)
    return int(ids[0, 0]) if mask.sum() == 2 else None


def check_words(tokenizer: Cut, words: Sequence[str]) -> None:
    """Refuses words that cannot be tokens of their own beside those there are.

    Args:
      tokenizer: cuts captions.
      words: to be added to it.

    Raises:
      ValueError: names the word.
    """
    for word in words:
        if not word or word != "".join(word.split()) or plain(word) != word:
            raise ValueError(f"new word {word!r}: a token is a text without spaces, such as sks-toy")
        if (known := token_id(tokenizer, word)) is not None:
            raise ValueError(f"new word {word!r} is a token that T5 already knows (id {known}): choose a rarer one")
    if len(set(words)) < len(words):
        raise ValueError(f"new words {', '.join(words)}: one is there twice; give each once")


@functools.cache
def _pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile(
        rf"{_PUBLISHED}|({'|'.join(map(re.escape, longest_first))})" if words else rf"{_PUBLISHED}|((?!))"
    )
