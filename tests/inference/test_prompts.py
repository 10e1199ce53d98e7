"""Texts and text states: what is given becomes states of one shape, and files keep them."""

from __future__ import annotations

import numpy as np
import pytest

from if_jax.inference.prompts import encode_texts, load_embeds, save_embeds

SHAPE = (4, 2)


def embed(captions):
    """States that say which caption they are of."""
    embed.seen = list(captions)
    return np.stack([np.full(SHAPE, len(caption), np.float32) for caption in captions])


def test_all_texts_are_encoded_in_one_go():
    options = {"negative_prompt": "ccc", "style_prompt": ["dddd", "eeeee"]}
    states = encode_texts(["a", "bb"], options, embed, SHAPE)
    assert embed.seen == ["a", "bb", "", "ccc", "dddd", "eeeee"]
    assert states.text[:, 0, 0].tolist() == [1, 2] and states.empty[:, 0, 0].tolist() == [0, 0]
    assert states.uncond[:, 0, 0].tolist() == [3, 3] and states.style[:, 0, 0].tolist() == [4, 5]
    plain = encode_texts("a", {}, embed, SHAPE)
    assert plain.style is None and plain.uncond is plain.empty


def test_states_need_no_encoder(tmp_path):
    save_embeds(tmp_path / "deep/two.safetensors", ["a", "bb"], embed(["a", "bb"]), embed([""])[0])
    prompts, options = load_embeds(tmp_path / "deep/two.safetensors")
    assert prompts == ["a", "bb"] and [path.name for path in (tmp_path / "deep").iterdir()] == ["two.safetensors"]

    def none(captions):
        raise AssertionError("the encoder was asked")

    states = encode_texts(None, options, none, SHAPE)
    np.testing.assert_array_equal(states.text, embed(["a", "bb"]))
    assert states.empty.shape == states.uncond.shape == (2, *SHAPE)


def test_a_file_that_holds_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_embeds(tmp_path / "none")
    (tmp_path / "text").write_text("a" * 20)
    with pytest.raises(ValueError, match="holds no text states"):
        load_embeds(tmp_path / "text")


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("a", {"style_prompt": ["b", "c"]}, "2 style prompts for 1 prompts"),
        ("a", {"negative_prompt": "b", "negative_prompt_embeds": np.zeros((1, *SHAPE))}, "not both"),
        (None, {"prompt_embeds": np.zeros((4, 2))}, r"prompt_embeds has shape \(4, 2\)"),
    ],
)
def test_what_does_not_fit_is_one_line(prompt, options, message):
    with pytest.raises(ValueError, match=message):
        encode_texts(prompt, options, embed, SHAPE)
