"""Through the command line, in real processes: 5,000 captions encoded, `kill -9`, the same command again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import record_stores
import webdataset

from if_jax.data import embeddings
from if_jax.scenes import grammar, sampling
from if_jax.scenes.scene import as_numpy

pytestmark = pytest.mark.slow  # three processes, two of which run the demo's encoder over 5,000 captions

ROOT = Path(__file__).parent.parent.parent
COUNT = 4999  # and the empty caption


def _write_source(path: Path) -> Path:
    """A tar of captions from the grammar, beside pictures of no meaning."""
    with webdataset.TarWriter(str(path)) as tar:
        for i, scene in enumerate(as_numpy(sampling.sample_scenes(np.arange(COUNT), 0))):
            caption = grammar.caption(scene, np.random.default_rng(i))
            tar.write(
                {
                    "__key__": f"{i:06d}",
                    "png": record_stores.encoded(record_stores.picture(i, (16, 16))),
                    "txt": caption,
                }
            )
    return path


def _command(source: Path, out: Path) -> list[str]:
    keys = {"data.source": source, "data.size": 16, "data.low_size": 4, "data.crop": 0}
    keys["text_encoder_from"] = ROOT / "if_jax/demo/stage_I"
    words = [
        "embed",
        "--config",
        ROOT / "configs/demo_sr.py",
        "--out",
        out,
        *[f"--config.{k}={v}" for k, v in keys.items()],
    ]
    return [sys.executable, "-W", "ignore", "-m", "if_jax", *map(str, words)]


def _environment() -> dict[str, str]:
    return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_cache_of_5000_captions_killed_in_the_middle_ends_with_the_same_bytes(tmp_path: Path) -> None:
    source, out = _write_source(tmp_path / "captions.tar"), tmp_path / "killed"
    subprocess.run(_command(source, tmp_path / "whole"), env=_environment(), check=True)
    partial = tmp_path / ".killed.partial"
    with subprocess.Popen(_command(source, out), env=_environment(), start_new_session=True) as process:
        while process.poll() is None and len(list(partial.glob(".states-*.json"))) < 2:
            time.sleep(0.02)
        while process.poll() is None and not list(partial.glob(".states-00002-*.partial")):
            time.sleep(0.02)  # the third shard of five is begun
        assert process.poll() is None, "the command ended before it could be killed"
        os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not out.exists()
    complete = {path.name: path.stat().st_mtime_ns for path in partial.glob("states-*")}
    assert 2 <= len(complete) < 5
    subprocess.run(_command(source, out), env=_environment(), check=True)
    assert {name: (out / name).stat().st_mtime_ns for name in complete} == complete  # not made again
    assert _files(out) == _files(tmp_path / "whole")
    kept = embeddings.Embeddings(out)
    kept.verify()
    assert kept.captions == COUNT and len(kept.note["sha256"]) == 5
