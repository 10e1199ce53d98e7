"""The embedding cache: exact to the bit, compact within a measured distance, refused beside anything else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import record_stores
import remote_sources
import tiny

from if_jax.checkpoints.stages import Encoders, TextEncoder
from if_jax.data import embed, embedding_shards, embeddings, pipeline, sources
from if_jax.data.preprocessing import Preparation
from if_jax.data.remote import RemotePath
from if_jax.parallel import mesh, rules
from if_jax.text.tokens import load_tokenizer

COUNT = 21
OPTIONS: dict[str, Any] = {"preparation": Preparation(), "sharding_rules": rules.PRESETS["dp"], "batch_size": 8}


@pytest.fixture(scope="module")
def text() -> TextEncoder:
    return TextEncoder(tiny.TEXT, tiny.random_params(tiny.TEXT), load_tokenizer("bytes"), "a" * 64)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(record_stores.write_tars(tmp_path_factory.mktemp("data") / "tars", COUNT, 11))


@pytest.fixture(scope="module")
def caches(source: str, text: TextEncoder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, stored, lines = tmp_path_factory.mktemp("caches"), sources.open_stored(source), []
    for form in embeddings.FORMS:
        embed.embed(stored, Encoders(text), root / form, form=form, mesh=mesh.make_mesh(), say=lines.append, **OPTIONS)
    assert lines[0].startswith("21 captions, exact: at most 0.1 MB, about 0.0 min") and "bytes each" in lines[1]
    assert lines[1].startswith(f"{root / 'exact'}: 21 captions, exact, ")
    return {form: root / form for form in embeddings.FORMS}


def _batch(source: str, seed: int = 1, **options: object) -> dict[str, np.ndarray]:
    common = {"size": 8, "batch_size": 8, "threads": 0, "tokenize": load_tokenizer("bytes"), "caption_dropout": 0.5}
    return next(pipeline.batches(source, seed=seed, **common, **options))


def test_exact_states_are_those_of_the_encoder_to_the_bit(source: str, text: TextEncoder, caches: dict) -> None:
    cached = _batch(source, embeddings=str(caches["exact"]), encoder=text.sha256)
    online = _batch(source)
    np.testing.assert_array_equal(cached["index"], online["index"])
    np.testing.assert_array_equal(cached["image"], online["image"])
    captions = [bytes(row[row > 2] - 3).decode() for row in online["ids"].astype(np.uint8)]
    assert "" in captions and len(set(captions)) > 1
    with jax.set_mesh(mesh.make_mesh()):
        states, _ = embed.make_encode(Encoders(text), mesh.make_mesh(), rules.PRESETS["dp"])(captions)
    assert cached["states"].dtype == states.dtype and cached["states"].shape == (8, 77, 32)
    np.testing.assert_array_equal(cached["states"].view(np.uint16), states.view(np.uint16))


def test_compact_states_are_near_and_much_smaller(source: str, text: TextEncoder, caches: dict) -> None:
    exact, compact = (
        _batch(source, embeddings=str(caches[form]), encoder=text.sha256)["states"].astype(np.float32)
        for form in embeddings.FORMS
    )
    tokens = _batch(source)["mask"].astype(bool)
    error = np.linalg.norm(exact - compact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert error[tokens].max() < 0.02  # int8 steps, bfloat16
    sizes = {form: len(embeddings.Embeddings(path)._read(0, 5)) for form, path in caches.items()}
    assert sizes["exact"] == 77 * 32 * 2 and sizes["compact"] < sizes["exact"] / 4


class _Encoder:
    """States that tell a caption's length; dies when it is called once too often."""

    def __init__(self, calls: int = 1000) -> None:
        self.calls, self.encoded = calls, 0

    def __call__(self, some: list[str]) -> tuple[np.ndarray, np.ndarray]:
        if self.encoded == self.calls:
            raise KeyboardInterrupt
        self.encoded += 1
        states = np.stack([np.full((77, 4), len(caption)) for caption in some])
        return states.astype(embeddings.BFLOAT16), np.asarray([1 + len(caption) for caption in some])


def _write(stored: sources.Stored, out: Path | RemotePath, encode: _Encoder, overwrite: bool = False) -> Any:
    shape = {"form": "exact", "encoder": "b", "length": 77, "width": 4, "batch_size": 3}
    spec = embedding_shards.make_spec(stored, Preparation(), **shape)
    target = embedding_shards.CacheFolder(out, spec)
    target.begin(overwrite)
    for shard in target.open_shards():
        target.write(
            shard, lambda shard=shard: embedding_shards.shard_records(stored, shard, spec, encode, lambda count: None)
        )
    return target.close()


@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_a_killed_cache_goes_on_to_the_same_bytes(
    where: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_shards, "PER_SHARD", 6)
    stored, encode = sources.open_stored(source), _Encoder()
    whole = _write(stored, tmp_path / "whole", encode)
    assert encode.encoded == 3 + 3 + 3 + 2 and len(whole["sha256"]) == 4 and whole["captions"] == COUNT
    with remote_sources.served(tmp_path) as far:
        out = tmp_path / "out" if where == "disk" else RemotePath("gs://bucket/out")
        with pytest.raises(KeyboardInterrupt):
            _write(stored, out, _Encoder(7))
        with pytest.raises(FileNotFoundError, match="no cache of embeddings"):
            embeddings.Embeddings(out)
        encode = _Encoder()
        assert _write(stored, out, encode) == whole
        assert encode.encoded == 5  # two shards were complete
        if where == "disk":
            files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        else:
            files = {name.removeprefix("out/"): content for name, (content, _) in far.objects.items()}
            assert not far.refused
        assert files == {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
        cache = embeddings.Embeddings(out)
        assert [cache.states(number, 0, f"picture number {number}")[0, 0] for number in (0, 10, 20)] == [16, 17, 17]
        assert cache.states(20, 0, "")[0, 0] == 0
        with pytest.raises(FileExistsError, match="exists: choose another --out, or"):
            _write(stored, out, encode)
        assert where == "bucket" or _write(stored, out, encode, overwrite=True) == whole


def test_what_is_there_is_not_written_over(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = sources.open_stored(source)
    (tmp_path / "pictures").mkdir()
    with pytest.raises(FileExistsError, match="is no cache of embeddings and is kept"):
        _write(stored, tmp_path / "pictures", _Encoder(), overwrite=True)
    with remote_sources.served(tmp_path) as far:
        far.put("tars/00000.tar", b"a tar")
        with pytest.raises(FileExistsError, match="'gs://bucket/tars' holds something else: choose another --out"):
            _write(stored, RemotePath("gs://bucket/tars"), _Encoder())
        monkeypatch.setattr(embedding_shards, "PER_SHARD", 6)
        with pytest.raises(KeyboardInterrupt):
            _write(stored, RemotePath("gs://bucket/out"), _Encoder(4))
        monkeypatch.setattr(embedding_shards, "PER_SHARD", 7)
        with pytest.raises(FileExistsError, match="beginning of a cache of another source, encoder or form"):
            _write(stored, RemotePath("gs://bucket/out"), _Encoder())


def test_records_of_any_number_of_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_shards, "PER_SHARD", 4)
    folder = record_stores.write_prepared(tmp_path / "data", "coco", *record_stores.coco_like(10))
    stored = sources.open_stored(str(folder))
    assert _write(stored, tmp_path / "out", _Encoder())["captions"] == 30
    cache = embeddings.Embeddings(tmp_path / "out")
    for number, choice in ((0, 0), (3, 2), (4, 0), (9, 2)):
        cache.states(number, choice, f"caption {choice} of {number}")
    for number, choice, caption in ((9, 3, "caption 3 of 9"), (3, 1, "caption 2 of 3"), (2, 3, "caption 0 of 3")):
        with pytest.raises(ValueError, match=f"record {number} has another caption now"):
            cache.states(number, choice, caption)


def test_a_cache_is_refused_beside_anything_else(source: str, caches: dict, tmp_path: Path) -> None:
    opened, stored = embeddings.Embeddings(caches["exact"]), sources.open_stored(source)
    opened.check(stored, Preparation(), "a" * 64)
    opened.verify()
    other = sources.open_stored(str(record_stores.write_folder(tmp_path / "folder", 3)))
    cases = (
        (stored, Preparation(), "c" * 64, "another text encoder"),
        (other, Preparation(), "", "another source"),
        (stored, Preparation(clean=True), "", "another caption cleaning"),
        (stored, Preparation(preserve_case=True), "", "another case of captions"),
    )
    for other, preparation, encoder, words in cases:
        with pytest.raises(ValueError, match=words) as caught:
            opened.check(other, preparation, encoder)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="record 3 has another caption now"):
        opened.states(3, 0, "something else")
    with pytest.raises(ValueError, match="go with one stored source"):
        _batch("scenes", embeddings=str(caches["exact"]))
    shutil.copytree(caches["exact"], tmp_path / "copy")
    shard = next((tmp_path / "copy").glob("states-*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="is damaged"):
        embeddings.Embeddings(tmp_path / "copy").verify()
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        embeddings.Embeddings(tmp_path / "copy")
    with pytest.raises(FileNotFoundError, match="no cache of embeddings"):
        embeddings.Embeddings(tmp_path)


@pytest.mark.parametrize("form", embeddings.FORMS)
def test_a_cache_in_a_bucket_is_that_on_a_disk(form: str, source: str, caches: dict, tmp_path: Path) -> None:
    near = _batch(source, embeddings=str(caches[form]))
    with remote_sources.served(tmp_path) as far:
        address = remote_sources.upload(far, Path(source), "tars")
        cache = remote_sources.upload(far, caches[form], "states")
        there = _batch(address, embeddings=cache)
        for name in near:
            np.testing.assert_array_equal(there[name], near[name])
        opened = embeddings.Embeddings(cache)
        opened.verify()
        assert opened.fingerprint() == embeddings.Embeddings(caches[form]).fingerprint()
        shard = next(name for name in far.objects if "states-" in name)
        far.put(shard, far.objects[shard][0][:300])
        with pytest.raises(ValueError, match=rf"{Path(shard).name} is damaged or cut off: put it back, or run"):
            embeddings.Embeddings(cache).states(0, 0, "picture number 0")
        del far.objects[shard]
        with pytest.raises(FileNotFoundError, match=rf"{Path(shard).name} is missing: run `if-jax embed` again"):
            embeddings.Embeddings(cache)
