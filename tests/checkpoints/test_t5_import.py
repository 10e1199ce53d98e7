"""T5 encoders as others publish them: whole models with a decoder, shards, .bin files, tokenizers beside them."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from if_jax.checkpoints import release
from if_jax.models.t5 import T5Encoder

SIZES = {"vocab_size": 384, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
CAPTIONS = ["two red spheres", ""]


@pytest.fixture(scope="module")
def whole():
    """A small T5 v1.1 with its decoder and its own output table, random."""
    torch = pytest.importorskip("torch")
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(**SIZES, feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


def save(whole, folder, **options):
    whole.save_pretrained(folder, **options)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))


def as_bin(folder):
    """The same folder with `pytorch_model.bin`, as older releases have it."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("form", ["one file", "shards", "bin"])
def test_the_encoder_of_a_whole_t5(whole, tmp_path, form):
    torch = pytest.importorskip("torch")

    save(whole, tmp_path, **({"max_shard_size": "30KB"} if form == "shards" else {}))
    if form == "bin":
        as_bin(tmp_path)
    t5 = release.read_text_encoder(tmp_path)
    ids, mask = t5.tokenizer(CAPTIONS)
    ours = jax.jit(T5Encoder(t5.config).apply)({"params": t5.params}, ids, mask)
    with torch.inference_mode():
        theirs = whole.encoder(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state
    assert np.abs(ours - theirs.numpy()).max() <= 1e-5 * np.abs(theirs.numpy()).max()


def test_another_table_for_the_encoder_is_refused(whole, tmp_path):
    """shared and embed_tokens are one table in T5; a file in which they differ would give one of two pictures."""
    from safetensors.torch import load_file, save_file

    save(whole, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "encoder.embed_tokens.weight": tensors["shared.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"embed_tokens\.weight and shared\.weight differ"):
        release.read_text_encoder(tmp_path)
