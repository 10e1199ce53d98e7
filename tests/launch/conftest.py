"""A cloud for every test that calls the scripts."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from tpu_cloud import ROOT, Cloud


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A repository with the worker's script: its address and its commits, oldest first."""
    folder = tmp_path_factory.mktemp("origin")
    git = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run([*git, "init", "-q"], check=True)
    shutil.copytree(ROOT / "launch/tpu_vm", folder / "launch/tpu_vm", ignore=shutil.ignore_patterns("settings.sh"))
    shutil.copy(ROOT / "launch/arguments.sh", folder / "launch")
    for message in ("first", "second"):
        (folder / "note").write_text(message)
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-qm", message], check=True)
    log = subprocess.run([*git, "log", "--reverse", "--format=%H"], check=True, capture_output=True, text=True)
    return f"file://{folder}", log.stdout.split()


@pytest.fixture
def cloud(tmp_path, origin):
    cloud = Cloud(tmp_path, origin)
    yield cloud
    cloud.end()
