"""Text states: which rows are computed, and the shape of the empty caption's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from if_jax.models.t5 import T5Config, T5Encoder
from if_jax.text.encode import encode
from if_jax.text.tokens import ByteTokenizer

PROMPTS = ["a red cube", "two blue spheres", "a red cube", "A Red Cube ", ""]


@pytest.fixture(scope="module")
def encoder():
    module = T5Encoder(T5Config(vocab_size=384, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4))
    ids = jnp.zeros((1, 77), jnp.int32)
    params = jax.jit(module.init)(jax.random.key(0), ids, ids)
    return jax.jit(module.apply), params


def test_states_are_those_of_the_lower_cased_captions(encoder):
    apply, params = encoder
    ids, mask = ByteTokenizer()(["a red cube", "two blue spheres", "a red cube", "a red cube", ""])
    np.testing.assert_allclose(encode(apply, params, ByteTokenizer(), PROMPTS), apply(params, ids, mask), atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_captions_states_do_not_depend_on_its_neighbours(encoder, batch_size):
    apply, params = encoder
    together = encode(apply, params, ByteTokenizer(), PROMPTS, batch_size=batch_size)
    for row, prompt in enumerate(PROMPTS):
        alone = encode(apply, params, ByteTokenizer(), [prompt], batch_size=batch_size)
        np.testing.assert_array_equal(together[row], alone[0])


def test_every_distinct_caption_is_encoded_once_in_calls_of_one_shape():
    shapes = []

    def apply(params, ids, mask):
        shapes.append(ids.shape)
        return (ids * mask)[..., None] * params

    states = encode(apply, 2, ByteTokenizer(), PROMPTS, batch_size=2)
    assert shapes == [(2, 77), (2, 77)]  # three distinct captions
    assert states.shape == (5, 77, 1)
    np.testing.assert_array_equal(states[0], states[3])
    assert states[4, :2, 0].tolist() == [2, 0]


def test_the_empty_captions_states_have_two_distinct_rows(encoder):
    """One position is not masked, so all pads attend to it alone: IF's stored vector has this shape as well."""
    states = np.asarray(encode(*encoder, ByteTokenizer(), [""])[0])
    assert states.shape == (77, 32)
    np.testing.assert_allclose(states[2:], np.broadcast_to(states[1], (75, 32)), atol=1e-6)
    assert np.abs(states[0] - states[1]).max() > 1e-2
    assert np.abs(states[1]).max() > 1e-2


def test_cleaning_is_on_request(encoder):
    apply, params = encoder
    plain = encode(apply, params, ByteTokenizer(), ["<b>cube</b>"])
    cleaned = encode(apply, params, ByteTokenizer(), ["<b>cube</b>"], clean=True)
    np.testing.assert_array_equal(cleaned, encode(apply, params, ByteTokenizer(), ["cube"]))
    assert not np.array_equal(cleaned, plain)


def test_every_cut_prompt_is_reported(encoder, caplog):
    tokenizer = ByteTokenizer()
    for _ in range(2):
        encode(*encoder, tokenizer, ["red " * 50])
    assert len(caplog.records) == 2


def test_no_caption_is_refused(encoder):
    with pytest.raises(ValueError, match="captions is empty"):
        encode(*encoder, ByteTokenizer(), [])
