"""CLIP's tokenizer against transformers' own, from the same files."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import tiny_clip
from hypothesis import given, settings
from hypothesis import strategies as st

from if_jax.text.clip_tokens import CaptionReader, load_clip_tokenizer
from if_jax.text.tokens import ByteTokenizer

TEXTS = ["a red cube", "The RED cubes' isn't 123!!", "", "  two\n\tlines ", "naïve 日本 😀", "x" * 99]
TEXTS += [
    "it's we're I'll",
    "<|endoftext|> odd <|startoftext|>",
    "e\u0301 a_b-c d''s",
    "\u00a0½ ²Ⅷ",
    "red<|endoftext|>",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("clip") / "tokenizer"
    tiny_clip.tokenizer().save(place)
    return place


@pytest.fixture(scope="module")
def reference(folder):
    transformers = pytest.importorskip("transformers")
    own = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    length = tiny_clip.TEXT.max_position_embeddings
    return lambda texts: own(texts, padding="max_length", max_length=length, truncation=True)["input_ids"]


def test_ids_are_those_of_transformers(folder, reference):
    mine = load_clip_tokenizer(folder, tiny_clip.TEXT.max_position_embeddings)
    np.testing.assert_array_equal(mine(TEXTS), reference(TEXTS))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(mine))(TEXTS), mine(TEXTS))


@settings(max_examples=25, deadline=None)
@given(st.text(max_size=30))
def test_any_text_has_the_ids_of_transformers(folder, reference, text):
    mine = load_clip_tokenizer(folder, tiny_clip.TEXT.max_position_embeddings)
    text = text.encode("utf-8", "replace").decode()
    np.testing.assert_array_equal(mine([text]), reference([text]))


def test_a_tokenizer_json_does_as_well_and_another_pad_is_read(folder, tmp_path):
    whole = {"model": {"vocab": json.loads((folder / "vocab.json").read_text()), "merges": ["r e", ["re", "d</w>"]]}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "!"}}))
    ids = load_clip_tokenizer(tmp_path, 6)(["red", "cube"])
    assert ids[0].tolist() == [
        *(tiny_clip.WORDS.index(word) for word in ("<|startoftext|>", "red</w>")),
        ids[0, 2],
        0,
        0,
        0,
    ]
    assert ids.shape == (2, 6) and ids[1, -1] == tiny_clip.WORDS.index("<|endoftext|>")  # cut before the end mark


def test_a_reader_makes_what_each_encoder_takes():
    read = CaptionReader(ByteTokenizer(), tiny_clip.tokenizer(), 20)
    assert read.names == ("ids", "mask", "clip_ids")
    assert [rows.shape for rows in read(["a", "b"])] == [(2, 20), (2, 20), (2, 12)]
    assert CaptionReader(None, tiny_clip.tokenizer()).names == ("clip_ids",)


def test_what_is_no_tokenizer_of_clip_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"vocab\.json: no such file"):
        load_clip_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(FileNotFoundError, match=r"merges\.txt: no such file"):
        load_clip_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(ValueError, match="holds no tokenizer of CLIP"):
        load_clip_tokenizer(tmp_path)
