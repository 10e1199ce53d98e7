"""A cloud in a folder: a strict stand-in for gcloud, whose workers run the real commands in folders of their own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAND_IN = f'import sys; sys.path.insert(0, "{Path(__file__).parent}"); import gcloud_stand_in; gcloud_stand_in.main()'
SCRIPTS = sorted(path.stem for path in (ROOT / "launch/tpu_vm").glob("*.sh"))
SCRIPTS = [name for name in SCRIPTS if name not in ("common", "worker", "settings.example")]
TRAIN = ["--config", "configs/demo_base.py", "--workdir=gs://bucket/run 1", '--config.note=it\'s "$HOME" & more']

# Makes the environment of a worker. FAIL names the worker whose pip fails.
PYTHON = """#!/bin/bash
mkdir -p "$3/bin" && cp "$(dirname "$0")/pip" "$(dirname "$0")/if-jax" "$3/bin"
"""
PIP = """#!/bin/bash
[[ ${HOSTNAME##*-w-} == "$(cat "$HOME/../fail" 2>/dev/null)" ]] && { echo "No space left on device" >&2; exit 1; }
echo "$@" >>"$HOME/pip"
"""
# The doctor says what is in $CLOUD/data. A training process: line N of $CLOUD/plan is what the N-th start does on each
# worker: an exit code, or "runs".
IF_JAX = """#!/bin/bash
[[ $1 == doctor ]] && { cat "$HOME/../data" 2>/dev/null || echo "pass data: scenes: not in a bucket"; exit; }
starts="$HOME/../starts-${HOSTNAME##*-w-}"
printf '%s\\n' "$@" >"$HOME/../arguments"
git rev-parse HEAD >>"$starts"
cp "$HOME/../next" "$HOME/../rev" 2>/dev/null  # meanwhile the checkout of the one who watches moves on
set -- $(sed -n "$(wc -l <"$starts")p" "$HOME/../plan")
shift $((${HOSTNAME##*-w-} % $#))
trap 'echo saved; exit 143' TERM
printf 'step 1\\rstep 2\\n'
[[ $1 == runs ]] || exit "$1"
while true; do sleep 0.05; done
"""


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


class Cloud:
    """A cloud in a folder, and the scripts called with settings for it."""

    def __init__(self, folder: Path, origin: tuple[str, list[str]]):
        self.folder, (self.repo, self.commits) = folder, origin
        (folder / "bin").mkdir()
        (folder / "tools").mkdir()
        self._program("bin/gcloud", f'#!/bin/bash\nexec "{sys.executable}" -SE -c \'{STAND_IN}\' "$@"\n')
        for name, text in (("python3.11", PYTHON), ("pip", PIP), ("if-jax", IF_JAX)):
            self._program(f"tools/{name}", text)
        self.settings()
        self.plan("runs")

    def _program(self, path: str, text: str) -> None:
        (self.folder / path).write_text(text)
        (self.folder / path).chmod(0o755)

    def settings(self, **changed: str) -> None:
        words = {"NAME": "if-base", "TYPE": "v6e-16", "ZONE": "us-east5-b", "PROJECT": "p", "TIER": "spot"}
        words |= {"TRAIN": "(" + " ".join("'" + word.replace("'", "'\\''") + "'" for word in TRAIN) + ")"}
        words |= {"REPO": self.repo, "REV": self.commits[0], "POLL_SECONDS": "0.02", "PRICE": "2"} | changed
        text = "".join(f"{key}={value}\n" for key, value in words.items() if value is not None)
        (self.folder / "settings.sh").write_text(text)

    def plan(self, *starts: str) -> None:
        (self.folder / "plan").write_text("\n".join(starts) + "\n")

    def events(self, *lines: str) -> None:
        (self.folder / "events").write_text("\n".join(lines) + "\n")

    def __call__(self, script: str, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess:
        command = ["bash", str(ROOT / f"launch/tpu_vm/{script}.sh"), "--settings", str(self.folder / "settings.sh")]
        return subprocess.run(
            [*command, *arguments],
            capture_output=True,
            text=True,
            env=self.environment(path),
            stdin=subprocess.DEVNULL,
            timeout=60,
            cwd=self.folder,
        )

    def environment(self, path: str | None = None) -> dict[str, str]:
        usual = "/usr/local/bin:/usr/bin:/bin"
        return {
            "CLOUD": str(self.folder),
            "HOME": str(self.folder),
            "PATH": path or f"{self.folder}/bin:{usual}",
            "WORKER_PATH": f"{self.folder}/tools:{usual}",
        }

    def calls(self) -> list[str]:
        """The verbs gcloud was called with, in order."""
        path = self.folder / "calls"
        lines = map(json.loads, path.read_text().splitlines()) if path.exists() else []
        return [" ".join(words[2:4] if words[0] == "compute" else words[:2]) for words in lines]

    def state(self) -> dict:
        return json.loads((self.folder / "cloud.json").read_text())

    def starts(self, worker: int = 0) -> list[str]:
        """The commit of every start of training on a worker."""
        path = self.folder / f"starts-{worker}"
        return path.read_text().split() if path.exists() else []

    def granted(self) -> None:
        """As after create.sh."""
        state = {"request": "ACTIVE", "node": "READY", "type": "v6e-16", "lost": [], "fails": False}
        (self.folder / "cloud.json").write_text(json.dumps(state))
        for worker in range(4):
            (self.folder / f"worker-{worker}").mkdir()

    def set_up(self) -> None:
        """As after create.sh and setup.sh."""
        self.granted()
        for worker in range(4):
            home = self.folder / f"worker-{worker}"
            subprocess.run(["git", "clone", "-q", self.repo, home / "if_jax"], check=True)
            subprocess.run(["git", "-C", home / "if_jax", "checkout", "-q", "--detach", self.commits[0]], check=True)
            shutil.copytree(self.folder / "tools", home / "if_jax-venv/bin")

    def end(self) -> None:
        for path in self.folder.glob("worker-*/group"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(path.read_text()), signal.SIGKILL)


@pytest.fixture
def cloud(tmp_path, origin):
    cloud = Cloud(tmp_path, origin)
    yield cloud
    cloud.end()


def error_of(done: subprocess.CompletedProcess) -> str:
    """The one line that says what is wrong."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert done.returncode != 0
    return lines[0]


COSTS = "costs money until you delete it: launch/tpu_vm/delete.sh"
