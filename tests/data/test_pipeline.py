"""Batches: a pure function of source, seed and step, however they are made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from drawn_scenes import draw_scenes

from if_jax.data import builders, pipeline, samples
from if_jax.scenes import grammar, sampling
from if_jax.scenes.scene import as_numpy
from if_jax.text.tokens import load_tokenizer

SIZE, ROWS = 16, 8


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("data") / "scenes"
    builders.build("scenes", out, count=8, size=SIZE, seed=2)
    return str(out)


@pytest.fixture(params=["scenes", "folder"])
def source(request: pytest.FixtureRequest, stored: str) -> str:
    return stored if request.param == "folder" else "scenes"


def _take(source: str, count: int = 1, **changes: object) -> list[dict[str, np.ndarray]]:
    options = {"size": SIZE, "batch_size": ROWS, "seed": 7, "tokenize": load_tokenizer("bytes"), "threads": 0}
    batches = pipeline.batches(source, **(options | changes))
    return [next(batches) for _ in range(count)]


def _equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def _text(batch: dict[str, np.ndarray]) -> list[str]:
    return [bytes(row[row > 2] - 3).decode() for row in batch["ids"].astype(np.uint8)]


def test_a_batch_has_the_fields_training_needs(source: str) -> None:
    (batch,) = _take(source)
    shapes = {name: (value.shape, value.dtype) for name, value in batch.items()}
    assert shapes == {
        "image": ((ROWS, SIZE, SIZE, 3), np.uint8),
        "ids": ((ROWS, 77), np.int32),
        "mask": ((ROWS, 77), np.int32),
        "index": ((ROWS,), np.int64),
    }


def test_a_batch_depends_on_source_seed_and_step_only(source: str) -> None:
    first = _take(source, 6)
    again = _take(source, 6, threads=3)  # batches are made out of order there
    assert all(_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not _equal(first[0], first[1])
    assert not _equal(first[0], _take(source, seed=8)[0])


def test_resuming_continues_with_the_batch_that_would_have_come(source: str) -> None:
    rows = 6 if source != "scenes" else ROWS
    whole = _take(source, 6, batch_size=rows)  # the folder holds eight pictures, a batch six: epochs end within batches
    for start in (1, 4):
        resumed = _take(source, 6 - start, batch_size=rows, start_step=start, threads=2)
        assert all(_equal(a, b) for a, b in zip(whole[start:], resumed, strict=True))


def test_shards_are_parts_of_the_whole(source: str) -> None:
    rows = _take(source, 4, start_step=6)  # those of a whole batch of twice as many, steps 3 and 4
    parts = [_take(source, 2, start_step=3, batch_size=2 * ROWS, shard_index=i, shard_count=2) for i in range(2)]
    assert all(_equal(rows[2 * k + i], parts[i][k]) for k in range(2) for i in range(2))
    if source != "scenes":
        whole = _take(source, 2, start_step=3, batch_size=2 * ROWS)
        for k in range(2):
            assert _equal(whole[k], {name: np.concatenate([part[k][name] for part in parts]) for name in whole[k]})


def test_every_epoch_shows_every_stored_picture_once_in_another_order(stored: str) -> None:
    batches = _take(stored, 10, batch_size=4)
    seen = [np.concatenate([batches[i]["index"], batches[i + 1]["index"]]) for i in range(0, 10, 2)]
    assert all(sorted(epoch) == list(range(8)) for epoch in seen)
    assert len({tuple(epoch) for epoch in seen}) == 5


@pytest.mark.parametrize("count", [9, samples._SMALL])
def test_small_and_large_sets_are_shuffled_anew_every_epoch(count: int) -> None:
    order, other = (samples._shuffled(count, seed) for seed in (1, 2))
    epochs = [[order(position) for position in range(k * count, (k + 1) * count)] for k in (0, 1, 7)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, [other(position) for position in range(count)]]}) == 4


def test_drawn_batches_show_scene_after_scene() -> None:
    start = 3  # a batch in which three scenes have a sign
    batch = _take("scenes", start_step=start, caption_dropout=0.0)[0]
    numbers = np.arange(start * ROWS, (start + 1) * ROWS)
    np.testing.assert_array_equal(batch["index"], numbers)
    np.testing.assert_array_equal(batch["image"], draw_scenes(numbers, 7, SIZE))
    drawn = as_numpy(sampling.sample_scenes(numbers, 7))
    parsed = [grammar.parse_caption(text) for text in _text(batch)]
    assert [caption.word for caption in parsed] == ["stop", "", "", "", "sun", "fish", "", ""]
    assert [caption.word for caption in parsed] == list(map(grammar.word, drawn))
    for caption, scene in zip(parsed, drawn, strict=True):
        named = sorted((group.number, group.shape) for group in caption.groups)
        assert named == sorted((len(group.slots), group.shape) for group in grammar.groups(scene))


def test_captions_are_dropped_at_the_given_rate_and_else_unchanged(stored: str) -> None:
    full, some, none = (_take(stored, 40, caption_dropout=share) for share in (0.0, 0.25, 1.0))
    full, some, none = ([text for batch in batches for text in _text(batch)] for batches in (full, some, none))
    assert all(full) and not any(none)
    assert all(text in ("", kept) for text, kept in zip(some, full, strict=True))
    assert 0.17 < some.count("") / len(some) < 0.33
    dropped = _take(stored, caption_dropout=1.0)[0]
    assert (dropped["ids"][:, 0] == 1).all() and (dropped["mask"].sum(1) == 1).all()  # "" is the end mark alone


def test_stored_pictures_are_scaled_down_but_not_up(stored: str) -> None:
    (full,), (half,) = _take(stored), _take(stored, size=SIZE // 2)
    np.testing.assert_array_equal(full["index"], half["index"])
    coarse = full["image"].reshape(ROWS, 8, 2, 8, 2, 3).astype(float).mean((2, 4))
    assert np.abs(coarse - half["image"]).mean() < 6
    with pytest.raises(ValueError, match=r"no usable picture in .*: skipped 8: smaller than 64 px"):
        _take(stored, size=64)


def test_a_missing_or_foreign_folder_gets_one_line(tmp_path: Path) -> None:
    for folder, words in ((tmp_path / "none", "does not exist: .*if-jax data build"), (tmp_path, "lists no image")):
        with pytest.raises((FileNotFoundError, ValueError), match=words) as caught:
            _take(str(folder))
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 0}, "batch_size 0"),
        ({"batch_size": 5, "shard_count": 2}, "batch_size 5 does not divide over 2 hosts"),
        ({"shard_index": 2, "shard_count": 2}, "shard_index 2 of shard_count 2"),
        ({"seed": -1}, "seed -1"),
        ({"start_step": -1}, "start_step -1"),
        ({"caption_dropout": 1.5}, "caption_dropout 1.5"),
        ({"size": 0}, "size 0"),
        ({"threads": -1}, "threads -1"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _take("scenes", **change)
