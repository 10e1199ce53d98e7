"""CLIP's tokenizer: byte pairs of lower-case text, from the files that transformers keeps beside a CLIP.

Also the captions of a batch as all encoders of a stage take them, `CaptionReader`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from if_jax.text.tokens import TEXT_LENGTH, Tokenizer

_START, _END = "<|startoftext|>", "<|endoftext|>"
# Words, single digits and runs of signs, as OpenAI's code cuts a text before its byte pairs are joined.
_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class CLIPTokenizer:
    """Byte pairs of CLIP. Its files travel with the object, so it pickles into data workers and `save` copies them."""

    vocabulary: bytes = field(repr=False)  # vocab.json
    merges: bytes = field(repr=False)  # merges.txt
    pad: str = _END
    length: int = TEXT_LENGTH  # positions of a row

    @property
    def end_id(self) -> int:
        """Of the end mark."""
        return self._ids[_END]

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """Ids (B, length) int32: start mark, caption, end mark, pads; a long caption is cut before the end mark."""
        rows = self._backend.encode_batch([str(caption) for caption in captions], add_special_tokens=False)
        ids = np.full((len(rows), self.length), self._ids[self.pad], np.int32)
        for number, row in enumerate(rows):
            tokens = [self._ids[_START], *row.ids[: self.length - 2], self._ids[_END]]
            ids[number, : len(tokens)] = tokens
        return ids

    def save(self, folder: str | Path) -> None:
        """Write the files by which `load_clip_tokenizer` and transformers open it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.json").write_bytes(self.vocabulary)
        (folder / "merges.txt").write_bytes(self.merges)
        marks = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": self.pad}
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.length, **marks}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @cached_property
    def _ids(self) -> dict[str, int]:
        return json.loads(self.vocabulary)

    @cached_property
    def _backend(self) -> Any:
        import tokenizers as library
        from tokenizers import models, normalizers, pre_tokenizers

        lines = [line.split(" ") for line in self.merges.decode("utf-8").splitlines() if _is_pair(line)]
        pairs = [(first, second) for first, second in lines]
        model = models.BPE(
            self._ids, pairs, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=_END, fuse_unk=False
        )
        backend = library.Tokenizer(model)
        backend.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(library.Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(library.Regex(_PIECES), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        backend.add_special_tokens([_START, _END])
        return backend

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("vocabulary", "merges", "pad", "length")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)


def load_clip_tokenizer(folder: str | Path, length: int = TEXT_LENGTH) -> CLIPTokenizer:
    """Open the tokenizer beside a CLIP: vocab.json and merges.txt, or the same in a tokenizer.json.

    Args:
      folder: holds it.
      length: positions that the encoder reads.

    Raises:
      FileNotFoundError: names what is missing.
      ValueError: a damaged file, or one of another tokenizer.
    """
    folder = Path(folder)
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    try:
        if vocabulary.is_file() and merges.is_file():
            content = vocabulary.read_bytes(), merges.read_bytes()
        elif (whole := folder / "tokenizer.json").is_file():
            model = json.loads(whole.read_text(encoding="utf-8"))["model"]
            lines = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
            text = "#version: 0.2\n" + "\n".join(lines) + "\n"
            content = json.dumps(model["vocab"], ensure_ascii=False).encode(), text.encode()
        else:
            missing = merges if vocabulary.is_file() else vocabulary
            raise FileNotFoundError(f"{missing}: no such file; CLIP's tokenizer needs vocab.json and merges.txt")
        known = json.loads(content[0])
        if not isinstance(known, dict) or not {_START, _END} <= known.keys():
            raise ValueError(f"it lacks {_START} or {_END}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: holds no tokenizer of CLIP ({error}); copy it again") from None
    pad = _pad_token(folder / "tokenizer_config.json")
    return CLIPTokenizer(*content, pad if pad in known else _END, length)


@dataclass(frozen=True)
class CaptionReader:
    """Captions to what the encoders of a stage take, in the order of `names`."""

    t5: Tokenizer | None
    clip: CLIPTokenizer | None = None
    length: int = TEXT_LENGTH  # tokens that T5 reads

    @property
    def names(self) -> tuple[str, ...]:
        """Of the arrays in a batch: "ids" and "mask" of T5, "clip_ids" of CLIP."""
        return (("ids", "mask") if self.t5 else ()) + (("clip_ids",) if self.clip else ())

    def __call__(
        self, captions: Sequence[str], length: int | None = None, *, always_warn: bool = False
    ) -> tuple[np.ndarray, ...]:
        """Tokenize captions.

        Args:
          captions: B of them.
          length: tokens that T5 reads, `length` unless set.
          always_warn: see `Tokenizer`.

        Returns:
          int32 (B, L) each, L being the encoder's own.
        """
        arrays = self.t5(captions, length or self.length, always_warn=always_warn) if self.t5 else ()
        return (*arrays, self.clip(captions)) if self.clip else tuple(arrays)


def _is_pair(line: str) -> bool:
    return bool(line.strip()) and not line.startswith("#version") and line.count(" ") == 1


def _pad_token(path: Path) -> str:
    """The pad that a tokenizer_config.json names: Stable Diffusion 2 pads with "!", OpenAI with the end mark."""
    if not path.is_file():
        return _END
    try:
        pad = json.loads(path.read_text(encoding="utf-8")).get("pad_token")
    except (ValueError, AttributeError):
        raise ValueError(f"{path} is not a JSON object: copy it again") from None
    return str(pad.get("content")) if isinstance(pad, dict) else str(pad or _END)
