"""The launch scripts, with a gcloud that runs the workers' command here, in a folder of its own."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FAKE_GCLOUD = """#!/bin/bash
printf '%s\\n' "$@" >>"$HOME/gcloud.log"
if [[ $* == *describe* ]]; then echo "$FAKE_STATE"; [[ -n $FAKE_STATE ]]; exit; fi
while (($#)); do [[ $1 == --command ]] && exec bash -c "$2"; shift; done
"""

FAKE_IF_JAX = """#!/bin/bash
printf '%s\\n' "$@" >"$HOME/arguments.part" && mv "$HOME/arguments.part" "$HOME/arguments"
exec sleep 30
"""


@pytest.fixture
def home(tmp_path):
    """A worker on which setup has run: its home folder."""
    for path, content in (("bin/gcloud", FAKE_GCLOUD), ("if_jax-venv/bin/if-jax", FAKE_IF_JAX)):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(content)
        (tmp_path / path).chmod(0o755)
    (tmp_path / "if_jax").mkdir()
    return tmp_path


def launch(home: Path, *arguments: str, script: str = "tpu_vm.sh", state: str = "READY", **variables: str):
    environment = {"HOME": str(home), "PATH": f"{home}/bin:{os.environ['PATH']}", "FAKE_STATE": state, **variables}
    command = ["bash", str(ROOT / "launch" / script), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL, timeout=60
    )


def wait_for(path: Path) -> str:
    for _ in range(200):
        if path.exists():
            return path.read_text()
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


@pytest.fixture
def recipe():
    return str(sorted((ROOT / "configs").glob("*.py"))[0].relative_to(ROOT))


def test_train_starts_once_with_its_arguments_unchanged_and_stops(home, recipe):
    arguments = ["--config", recipe, "--workdir=gs://bucket/run 1", '--config.note=it\'s "$HOME" & more']
    started = launch(home, "--zone", "z", "--project", "p", "train", "if-pod", "--", *arguments)
    assert started.returncode == 0, started.stderr
    assert wait_for(home / "arguments").splitlines() == ["train", *arguments]
    called = (home / "gcloud.log").read_text().splitlines()
    assert "--worker=all" in called
    assert called.count("z") == called.count("p") == called.count("if-pod") == 2  # describe, then ssh
    again = launch(home, "train", "if-pod", "--", *arguments)
    assert again.returncode == 1 and "a run is going on" in again.stderr
    assert "told to stop" in launch(home, "stop", "if-pod").stdout
    for _ in range(100):
        if "no run" in launch(home, "stop", "if-pod").stdout:
            break
        time.sleep(0.05)
    else:
        raise AssertionError("the run did not stop")


def test_setup_installs_the_commit_asked_for(home, tmp_path):
    origin = tmp_path / "origin"
    git = ["git", "-C", str(origin), "-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run(["git", "init", "-q", str(origin)], check=True)
    for message in ("first", "second"):
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", message], check=True)
    first = subprocess.run([*git, "rev-parse", "HEAD~1"], check=True, capture_output=True, text=True).stdout.strip()
    pip = home / "if_jax-venv/bin/pip"
    pip.write_text('#!/bin/bash\necho "pip $*"\n')
    pip.chmod(0o755)
    (home / "if_jax").rmdir()
    for _ in range(2):  # the second time the clone is there
        done = launch(home, "--repo", f"file://{origin}", "--rev", first, "setup", "if-pod")
        assert done.returncode == 0, done.stderr
        assert "pip install -q -e .[tpu]" in done.stdout
        assert f"if_jax at {first[:7]}" in done.stdout


def test_dry_run_calls_nothing(home, recipe):
    shown = launch(home, "--dry-run", "train", "if-pod", "--", "--config", recipe, "--workdir", "gs://b/r")
    assert shown.returncode == 0
    assert shown.stdout.startswith("gcloud compute tpus tpu-vm ssh if-pod --worker=all --command ")
    assert not (home / "gcloud.log").exists()


@pytest.mark.parametrize(
    ("arguments", "state", "message"),
    [
        (["fly", "x"], "READY", 'unknown command "fly"'),
        (["train"], "READY", "NAME is missing"),
        (["--zone"], "READY", "--zone needs a value"),
        (["--nope", "log", "x"], "READY", "unknown option --nope"),
        (["train", "x", "--config", "y"], "READY", '"--" is missing'),
        (["train", "x", "--", "--workdir", "gs://b/r"], "READY", "--config is missing"),
        (["train", "x", "--", "--config", "configs/no.py", "--workdir", "gs://b"], "READY", "no.py does not exist"),
        (
            ["train", "x", "--", "--config", "RECIPE", "--workdir", "runs/a"],
            "READY",
            'is "runs/a": all workers must see',
        ),
        (["--repo", "here", "--rev", "a", "setup", "x"], "READY", '--repo is "here": give a URL'),
        (["log", "x", "y"], "READY", 'unexpected argument "y"'),
        (["log", "x"], "", 'TPU VM "x" was not found'),
        (["log", "x"], "STOPPED", 'TPU VM "x" is STOPPED, not READY'),
    ],
)
def test_mistakes_get_one_line_and_run_nothing(home, recipe, arguments, state, message):
    refused = launch(home, *[recipe if word == "RECIPE" else word for word in arguments], state=state)
    assert refused.returncode == 2
    assert message in refused.stderr and refused.stderr.count("\n") == 1
    log = home / "gcloud.log"
    assert not log.exists() or "ssh" not in log.read_text().split()


FAKE_TRAINING = """#!/bin/bash
# A training process: the last argument is its number. What each start does is told by $HOME/plan, a word a start.
[[ $1 == -c ]] && { echo 4321; exit; }
starts="$HOME/starts-${!#}"; echo "$@" >>"$starts"
case $(sed -n "$(wc -l <"$starts")p" "$HOME/plan") in
  lost) ((${!#} == 1)) && kill -9 $$; exec sleep 30 ;;
  mistake) ((${!#} == 1)) && exit 1; exec sleep 30 ;;
esac
echo "process ${!#}"
"""


def _local(home, plan, *arguments):
    (home / "python").write_text(FAKE_TRAINING)
    (home / "python").chmod(0o755)
    (home / "plan").write_text("\n".join(plan) + "\n")
    done = launch(home, "2", "--", *arguments, script="local.sh", PYTHON=str(home / "python"))
    starts = [(home / f"starts-{i}").read_text().splitlines() for i in range(2)]
    return done, starts


def test_local_starts_all_processes_again_when_one_is_lost(home):
    done, starts = _local(home, ["lost", "lost", "well"], "--config", "a b.py", f"--workdir={home}/run")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "process 0\n" and (home / "run" / "launch-1.log").read_text() == "process 1\n"
    assert done.stderr.count("one of 2 processes ended with code 137; starting again") == 2
    joined = "--coordinator localhost:4321 --processes 2 --process"
    for i in range(2):
        assert starts[i] == [f"-m if_jax train --config a b.py --workdir={home}/run {joined} {i}"] * 3


def test_local_does_not_repeat_mistakes(home):
    done, starts = _local(home, ["mistake"], "--config", "a.py", "--workdir", f"{home}/run")
    assert done.returncode == 1 and len(starts[0]) == len(starts[1]) == 1


def test_local_gives_up_on_a_run_that_never_gets_going(home):
    done, starts = _local(home, ["lost"] * 9, "--config", "a.py", "--workdir", f"{home}/run")
    assert done.returncode == 137 and len(starts[1]) == 5
    assert "error: ended 5 times in a row within a minute, last with code 137" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--", "a"], 'N is "x"'),
        (["2", "a"], '"--" is missing'),
        (["2", "--"], "no train arguments"),
        (["2", "--", "--config", "a.py"], "--workdir is missing"),
        ([], "usage"),
    ],
)
def test_local_refuses_mistakes(home, arguments, message):
    refused = launch(home, *arguments, script="local.sh")
    assert refused.returncode == 2 and message in refused.stderr
