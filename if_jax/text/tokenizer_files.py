"""The files of a tokenizer folder: its class, its added tokens, and the vocabulary as its library opens it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

TEXT_LENGTH = 77
PAD, EOS, UNKNOWN = 0, 1, 2

_POINTER = b"version https://git-lfs.github.com/spec/"
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


def save_config(folder: Path, class_name: str, sentinels: int) -> None:
    """Write the tokenizer_config.json by which transformers opens the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": class_name,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "extra_ids": sentinels,
        "model_max_length": TEXT_LENGTH,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
