"""A real T5 tokenizer and IF's own vector of the empty prompt; see tests/fetch_assets.py."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny
from conftest import ASSETS

from if_jax.models.t5 import T5Encoder
from if_jax.text.tokens import load_tokenizer

TOKENIZER = ASSETS / "tokenizer.json"
VECTOR = ASSETS / "deepfloyd_if/resources/zero_t5-v1_1-xxl_vector.npy"


@pytest.fixture(scope="module")
def tokenizer():
    if not TOKENIZER.is_file():
        pytest.skip("no real tokenizer: run python tests/fetch_assets.py")
    return load_tokenizer(TOKENIZER)


def test_known_tokens(tokenizer):
    """The sentence of T5's own documentation."""
    assert hashlib.sha256(TOKENIZER.read_bytes()).hexdigest().startswith("fe2ebbbbde2985be")
    assert tokenizer.vocab_size == 32100
    ids, mask = tokenizer(["translate English to German: That is good.", ""])
    assert ids[0, :10].tolist() == [13959, 1566, 12, 2968, 10, 466, 19, 207, 5, 1]
    assert mask.sum(1).tolist() == [10, 1] and not ids[0, 10:].any()
    assert ids[1].tolist() == [1] + [0] * 76


def test_outer_spaces_and_sentinels(tokenizer):
    plain, spaced = (tokenizer([text])[0] for text in ("a red cube", "  a red cube  "))
    np.testing.assert_array_equal(plain, spaced)
    ids, _ = tokenizer(["a <extra_id_0> cube </s>"])
    assert 32099 in ids[0]


def test_saved_folder_gives_transformers_the_same_tokens(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    captions = ["two red spheres and a blue cube", 'a sign that says "stop"', "", "naïve café, 12 €"]
    expected = theirs(captions, padding="max_length", truncation=True, max_length=77)
    np.testing.assert_array_equal(tokenizer(captions)[0], expected["input_ids"])


def test_the_empty_prompt_has_two_distinct_rows(tokenizer):
    """One unmasked key, the end of the text: it and every pad attend to it alone. IF's own numbers show it too."""
    config = replace(tiny.TEXT, vocab_size=32128)
    ids, mask = tokenizer([""])
    rows = jax.jit(T5Encoder(config).apply)({"params": tiny.random_params(config)}, ids, mask)[0]
    assert np.abs(rows[2:] - rows[1]).max() < 1e-6 and np.abs(rows[1] - rows[0]).max() > 1e-2
    if VECTOR.is_file():
        real = np.load(VECTOR)
        assert real.shape == (77, 4096) and len(np.unique(real, axis=0)) == 2
        assert (real[1:] == real[1]).all() and not (real[0] == real[1]).all()
