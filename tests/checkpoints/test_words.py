"""New words of a text encoder: files, releases and stock transformers agree on them; what cannot be is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from if_jax.checkpoints import convert, release, words
from if_jax.checkpoints.stages import TextEncoder
from if_jax.models.t5 import T5Encoder
from if_jax.text.tokens import load_tokenizer

WORDS = ["sks-toy", "zwx"]
CAPTIONS = ["a sks-toy cube", "zwx", "a red cube"]
ROWS = {word: row for word, row in zip(WORDS, np.random.default_rng(0).normal(size=(2, 32)), strict=True)}
STAGES = [tiny.on_one_level(stage) for stage in tiny.stages()]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words") / words.FILE_NAME
    words.write_words(path, ROWS, {"step": "7"})
    return path


def states(text: Any) -> np.ndarray:
    """Of `CAPTIONS`, by our encoder."""
    ids, mask = text.tokenizer(CAPTIONS)
    encode = jax.jit(T5Encoder(text.config).apply)
    return np.asarray(encode({"params": jax.tree.map(jnp.asarray, text.params)}, ids, mask))


def test_words_are_written_and_read_to_the_bit(file: Path, tmp_path: Path) -> None:
    for word, row in words.read_words(file.parent).items():
        np.testing.assert_array_equal(row, ROWS[word].astype(np.float32))
    save_file({"cat-toy": np.arange(6, dtype=np.float32).reshape(2, 3)}, tmp_path / "two.safetensors")  # diffusers'
    several = words.read_words(tmp_path / "two.safetensors")
    assert list(several) == ["cat-toy", "cat-toy_1"] and several["cat-toy_1"].tolist() == [3, 4, 5]


def test_words_begin_as_the_mean_of_a_text(file: Path) -> None:
    text = TextEncoder(tiny.TEXT, STAGES[0].text_params or {}, load_tokenizer("bytes"), "kept")
    table = np.asarray(text.params["shared"]["embedding"])
    of_text = words.with_words(text, WORDS, "cube")
    assert of_text.sha256 == "kept" and of_text.config.vocab_size == 386 and of_text.tokenizer.vocab_size == 386
    expected = table[[3 + byte for byte in b"cube"]].mean(0)
    np.testing.assert_allclose(words.word_rows(of_text, 2), [expected, expected], rtol=1e-6)
    np.testing.assert_allclose(words.word_rows(words.with_words(text, ["zwx"]), 1)[0], table.mean(0), rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(of_text.params["shared"]["embedding"])[:384], table)
    # The published T5 has more rows than tokens: there the words take the next of those.
    wide = {**text.params, "shared": {"embedding": np.concatenate([table, table[:4]])}}
    padded = dataclasses.replace(text, config=dataclasses.replace(tiny.TEXT, vocab_size=388), params=wide)
    rows = words.with_rows(words.with_words(padded, WORDS), np.ones((2, 32)))
    assert rows.config.vocab_size == 388
    assert np.asarray(rows.params["shared"]["embedding"]).mean(1)[384:386].tolist() == [1, 1]


def test_transformers_says_the_same_of_a_new_word(file: Path, tmp_path: Path) -> None:
    """Of a release with the words in it, and of one without them after the lines of docs/finetune.md."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    plain, extended = STAGES[0], words.with_word_files(STAGES, [file])
    release.write_cascade(tmp_path / "plain", [plain], tiny.DEFAULTS[:1])
    release.write_cascade(tmp_path / "with", extended, tiny.DEFAULTS)
    opened = release.read_text_encoder(tmp_path / "with")
    ours, before = states(opened), states(release.read_text_encoder(tmp_path / "plain"))
    np.testing.assert_array_equal(ours[2], before[2])  # a caption without them
    assert np.abs(ours[:2] - before[:2]).max() > 0.1
    loaded = tiny.open_in_diffusers(tmp_path / "with/stage_I")
    added = tiny.open_in_diffusers(tmp_path / "plain/stage_I")
    rows = {word: torch.from_numpy(row) for word, row in load_file(file).items()}
    added.tokenizer.add_tokens([transformers.AddedToken(word, normalized=False) for word in rows])
    added.text_encoder.resize_token_embeddings(max(len(added.tokenizer), added.text_encoder.config.vocab_size))
    for word, row in rows.items():
        number = added.tokenizer.convert_tokens_to_ids(word)
        added.text_encoder.get_input_embeddings().weight.data[number] = row
    for pipeline in (loaded, added):
        batch = pipeline.tokenizer(CAPTIONS, padding="max_length", max_length=77, return_tensors="pt")
        with torch.no_grad():
            theirs = pipeline.text_encoder(batch["input_ids"], attention_mask=batch["attention_mask"])[0].numpy()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(ours).max())


def test_words_survive_conversion(file: Path, tmp_path: Path) -> None:
    release.write_cascade(tmp_path / "plain", STAGES, tiny.DEFAULTS)
    model = convert.with_new_words(convert.open_model(tmp_path / "plain"), [file])
    convert.write_model(model, tmp_path / "once", "diffusers", release.Storage(), False)
    again = convert.open_model(tmp_path / "once")
    convert.write_model(again, tmp_path / "twice", "diffusers", release.Storage(), False)
    stages, _ = release.read_cascade(tmp_path / "twice")
    text = stages[0].text_encoder()
    assert text is not None and len(stages) == 2
    np.testing.assert_array_equal(words.word_rows(text, 2), np.stack(list(ROWS.values())).astype(np.float32))
    assert text.tokenizer(["zwx"])[0][0, 0] == 385
    with pytest.raises(ValueError, match="'sks-toy' is a token that T5 already knows"):
        convert.with_new_words(again, [file])


def test_what_cannot_be_added_is_refused_in_one_line(file: Path, tmp_path: Path) -> None:
    narrow, odd = tmp_path / "narrow.safetensors", tmp_path / "odd.safetensors"
    save_file({"zwx": np.ones(3, np.float32)}, narrow)
    save_file({"zwx": np.ones((1, 2, 3), np.float32)}, odd)
    (tmp_path / "words.pt").write_bytes(b"x")
    cases: list[tuple[Any, type[Exception], str]] = [
        (narrow, ValueError, "the row of zwx is 3 wide, this text encoder's are 32"),
        (odd, ValueError, r"holds zwx of shape \(1, 2, 3\), no row"),
        (tmp_path, FileNotFoundError, "no such file; give a file of new words"),
        (tmp_path / "words.pt", ValueError, r"is no \.safetensors file"),
    ]
    for path, kind, message in cases:
        with pytest.raises(kind, match=message) as error:
            words.with_word_files(STAGES, [path])
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="the first stage brings no text encoder"):
        words.with_word_files(STAGES[1:], [file])
    with pytest.raises(ValueError, match="exists already"):
        words.write_words(file, ROWS)
