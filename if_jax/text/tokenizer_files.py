"""The files of a tokenizer folder: its class, its added tokens, and the vocabulary as its library opens it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TEXT_LENGTH = 77
PAD, EOS, UNKNOWN = 0, 1, 2

_POINTER = b"version https://git-lfs.github.com/spec/"
# How an added token is found: wherever its very letters stand.
_AS_IT_STANDS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": False}
_PUBLISHED = re.compile(r"<pad>|</s>|<unk>|<extra_id_[0-9]+>")


def class_name_of(config_file: Path) -> str | None:
    """Name of the transformers class in a tokenizer_config.json; None where it says none."""
    if not config_file.is_file():
        return None
    try:
        return json.loads(config_file.read_text(encoding="utf-8")).get("tokenizer_class")
    except (ValueError, AttributeError):
        raise ValueError(f'tokenizer file "{config_file}" is not a JSON object: copy it again') from None


def added_tokens(folder: Path) -> dict[str, int]:
    """Tokens that were added to the published vocabulary, with their ids, from all files that transformers keeps."""
    added: dict[str, int] = {}
    path = folder
    try:
        if (path := folder / "added_tokens.json").is_file():
            added |= {str(token): int(number) for token, number in json.loads(path.read_text(encoding="utf-8")).items()}
        if (path := folder / "tokenizer_config.json").is_file():
            rows = json.loads(path.read_text(encoding="utf-8")).get("added_tokens_decoder") or {}
            added |= {str(row["content"]): int(number) for number, row in rows.items()}
    except (ValueError, AttributeError, KeyError, TypeError):
        raise ValueError(
            f'tokenizer file "{path}" does not list added tokens as transformers does: copy it again'
        ) from None
    return {token: number for token, number in added.items() if not _PUBLISHED.fullmatch(token)}


def open_sentencepiece(model: bytes) -> Any:
    """The bytes of a spiece.model as its processor; ValueError where they are none of a T5."""
    if model.startswith(_POINTER):
        raise ValueError("is a Git LFS pointer, not the file itself: run `git lfs pull` where it was cloned, then")
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError:
        raise ValueError("is not a SentencePiece model") from None
    _check_numbering((processor.pad_id(), processor.eos_id(), processor.unk_id()))
    return processor


def open_json(model: bytes) -> Any:
    """The bytes of a tokenizer.json as the tokenizers library opens them; ValueError where they are none of a T5."""
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_str(model.decode("utf-8"))
    except Exception:  # tokenizers raises bare Exception for a file it cannot read
        raise ValueError("is not a tokenizer.json") from None
    _check_numbering(tuple(backend.token_to_id(token) for token in ("<pad>", "</s>", "<unk>")))
    backend.no_padding()
    backend.no_truncation()
    return backend


def _check_numbering(numbering: tuple[int | None, ...]) -> None:
    if numbering != (PAD, EOS, UNKNOWN):
        raise ValueError(f"numbers pad, end of text and unknown {numbering} instead of {(PAD, EOS, UNKNOWN)}")


def json_with_tokens(model: bytes, tokens: Sequence[str], first: int) -> bytes:
    """The bytes of a tokenizer.json with further tokens, whose ids begin at `first`."""
    content = json.loads(model)
    rows = [{"id": first + number, "content": token, **_AS_IT_STANDS} for number, token in enumerate(tokens)]
    content["added_tokens"] = [*(content.get("added_tokens") or []), *rows]
    return json.dumps(content, ensure_ascii=False).encode()


def save_config(
    folder: Path, class_name: str, sentinels: int, added: Mapping[str, int] | None = None, first_sentinel: int = 0
) -> None:
    """Write the files by which transformers opens the folder.

    Args:
      folder: of the tokenizer; it is made.
      class_name: of transformers.
      sentinels: how many the vocabulary has.
      added: tokens added to it, with their ids.
      first_sentinel: id of sentinel 0 of ByT5, whose class in transformers would else number them after the added ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "tokenizer_class": class_name,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "extra_ids": sentinels,
        "model_max_length": TEXT_LENGTH,
    }
    if added:
        decoder = {number: {"content": token, **_AS_IT_STANDS} for token, number in added.items()}
        if first_sentinel:
            names = {number: f"<extra_id_{number}>" for number in range(sentinels)}
            sentinel = {**_AS_IT_STANDS, "special": True}
            decoder |= {first_sentinel + number: {"content": name, **sentinel} for number, name in names.items()}
        config["added_tokens_decoder"] = {str(number): decoder[number] for number in sorted(decoder)}
        (folder / "added_tokens.json").write_text(json.dumps(added, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
