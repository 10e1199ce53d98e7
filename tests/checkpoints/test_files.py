"""A file is whole or not there, on a disk as in a bucket."""

from __future__ import annotations

from pathlib import Path

import pytest
from etils import epath

from if_jax.checkpoints.files import atomic_file


@pytest.mark.parametrize("kind", [Path, epath.Path])
def test_a_file_is_replaced_whole_or_kept(tmp_path, kind):
    path = kind(tmp_path) / "scores.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as beside:
        beside.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    with atomic_file(path) as beside, atomic_file(path) as other:  # as two processes at once
        beside.write_text("new")
        other.write_text("newer")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [file.name for file in path.parent.iterdir()] == ["scores.json"]
