"""launch/local.sh with processes that do as they are told."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

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


@pytest.fixture
def home(tmp_path):
    return tmp_path


def launch(home: Path, *arguments: str, **variables: str):
    environment = {"HOME": str(home), "PATH": os.environ["PATH"], **variables}
    command = ["bash", str(ROOT / "launch/local.sh"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL, timeout=60
    )


def _local(home, plan, *arguments, pause="0", command=()):
    (home / "python").write_text(FAKE_TRAINING)
    (home / "python").chmod(0o755)
    (home / "plan").write_text("\n".join(plan) + "\n")
    done = launch(home, "2", *command, "--", *arguments, PYTHON=str(home / "python"), IF_JAX_PAUSE=pause)
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


def test_local_embeds_as_it_trains(home):
    done, starts = _local(home, ["lost", "well"], "--config", "a.py", f"--out={home}/states", command=["embed"])
    assert done.returncode == 0, done.stderr
    assert (home / "launch-1.log").read_text() == "process 1\n" and not (home / "states").exists()
    words = f"-m if_jax embed --config a.py --out={home}/states --coordinator localhost:4321 --processes 2 --process"
    assert starts == [[f"{words} {i}"] * 2 for i in range(2)]


def test_local_does_not_repeat_mistakes(home):
    done, starts = _local(home, ["mistake"], "--config", "a.py", "--workdir", f"{home}/run")
    assert done.returncode == 1 and len(starts[0]) == len(starts[1]) == 1


def test_local_waits_before_it_tries_again(home):
    began = time.monotonic()
    done, _ = _local(home, ["lost", "well"], "--config", "a.py", f"--workdir={home}/run", pause="1")
    assert done.returncode == 0 and time.monotonic() - began >= 1


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
        (["2", "embed", "--", "--config", "a.py"], "--out is missing"),
        (["2", "dream", "--", "--config", "a.py"], '"--" is missing'),
        ([], "usage"),
    ],
)
def test_local_refuses_mistakes(home, arguments, message):
    refused = launch(home, *arguments)
    assert refused.returncode == 2 and message in refused.stderr
