"""Every shell block of docs/launch.md, line by line as it stands, against the stand-ins for gcloud, xpk and Slurm."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import test_clusters as clusters
import tpu_cloud
from blocks import blocks, commands

from if_jax.cli import main

ROOT = Path(__file__).parents[2]
BLOCKS = {block.heading: block.text for block in blocks(ROOT / "docs/launch.md")}
FROM_A_BUCKET = "From an img2dataset bucket to a run"
origin, cloud, home = tpu_cloud.origin, tpu_cloud.cloud, clusters.home

# Accepts the options of the block, runs the script as a batch job of one node, as Slurm 22.05 and later would.
SBATCH = """#!/bin/bash
while [[ $1 == --* ]]; do
  case $1 in
    --nodes | --ntasks-per-node | --gpus-per-node | --cpus-per-task | --time) shift 2 ;;
    *) echo "sbatch: unrecognized option '$1'" >&2; exit 1 ;;
  esac
done
export SLURM_JOB_ID=7 SLURM_CPUS_PER_TASK=8 SLURM_GPUS_ON_NODE=4
exec bash "$@"
"""
# `xpk cluster …` of 1.16; `xpk workload …` is that of test_clusters.
XPK = """#!/bin/bash
[[ $1 == cluster ]] || exec "$HOME/bin/xpk-workload" "$@"
case $2 in
  create) known=" --cluster --tpu-type --num-slices --zone --project " ;;
  delete) known=" --cluster --zone --project " ;;
  *) exit 2 ;;
esac
shift 2
while (($#)); do
  [[ $1 == --spot ]] && { shift; continue; }
  [[ $known == *" $1 "* ]] || { echo "unrecognized arguments: $1" >&2; exit 2; }
  shift 2 || exit 2
done
"""


def test_there_is_a_test_for_every_block():
    assert BLOCKS.keys() == {"A TPU slice", FROM_A_BUCKET, "GKE", "Slurm", "A Slurm of one node"}


def test_a_slurm_of_one_node_is_that_of_the_slow_test():
    """Read, not run: it installs packages and starts daemons. tests/launch/test_slurm_real.py does what it says."""
    text = BLOCKS["A Slurm of one node"]
    assert subprocess.run(["bash", "-n", "-c", text], capture_output=True).returncode == 0
    words = [word for command in commands(text) for word in command]
    for path in ("tests/launch/slurm_node.sh", "launch/slurm.sh"):
        assert path in words and (ROOT / path).is_file()


def test_a_tpu_slice(cloud, tmp_path):
    """In a checkout of its own; after the first line settings.sh is edited, as it says."""
    checkout = tmp_path / "checkout"
    subprocess.run(["git", "clone", "-q", cloud.repo, checkout], check=True)
    shutil.copytree(ROOT / "configs", checkout / "configs")
    copied, *lines = (" ".join(words) for words in commands(BLOCKS["A TPU slice"]))
    subprocess.run(copied, shell=True, cwd=checkout, check=True)
    settings = checkout / "launch/tpu_vm/settings.sh"
    text = settings.read_text().replace("gs://BUCKET/", "gs://bucket/")
    settings.write_text(f"{text}\nREPO={cloud.repo}\nREV={cloud.commits[0]}\nPOLL_SECONDS=0.02\n")
    for line in lines:
        typed, terminal = pty.openpty()  # delete.sh asks whoever sits there
        os.write(typed, b"y\n")
        done = subprocess.run(
            line,
            shell=True,
            cwd=checkout,
            env=cloud.environment(),
            stdin=terminal,
            capture_output=True,
            text=True,
            timeout=60,
        )
        os.close(typed)
        os.close(terminal)
        assert done.returncode == 0, (line, done.stderr)
    assert (checkout / "fetched/if-base/worker-3.log").is_file() and cloud.state() == {}


def test_from_a_bucket_to_a_run(cloud, tmp_path):
    """img2dataset is not run, and what if-jax does with a bucket is tested in tests/data; the rest is, as it stands."""
    checkout = tmp_path / "checkout"
    subprocess.run(["git", "clone", "-q", cloud.repo, checkout], check=True)
    shutil.copytree(ROOT / "configs", checkout / "configs")
    keys = "--config.data.source=gs://b/shards"
    cloud.settings(
        TRAIN=f"(--config configs/if_I_L.py {keys} --workdir gs://b/run)",
        EMBED=f"(--config configs/if_I_L.py {keys} --out gs://b/states)",
    )
    shutil.copy(cloud.folder / "settings.sh", checkout / "launch/tpu_vm")
    cloud.plan("0", "runs")
    for words in commands(BLOCKS[FROM_A_BUCKET]):
        if words[0] == "img2dataset":
            continue
        if words[0] == "if-jax":
            main.commands["data"].commands[words[2]].make_context(words[2], words[3:])  # raises for an unknown option
            continue
        environment = cloud.environment()
        done = subprocess.run(
            words, cwd=checkout, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, (words, done.stderr)
        time.sleep(0.3)
    assert cloud.starts(3) == [cloud.commits[0]] * 2


@pytest.mark.parametrize("heading", ["GKE", "Slurm"])
def test_a_cluster(heading, home):
    programs = home / "bin"
    (programs / "xpk").rename(programs / "xpk-workload")
    for name, text in (("xpk", XPK), ("sbatch", SBATCH), ("pip", clusters.NOTE)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (home / "venv/bin").mkdir(parents=True)
    (home / "venv/bin/activate").write_text("echo activated\n")
    environment = {"HOME": str(home), "PATH": f"{programs}:/usr/local/bin:/usr/bin:/bin"}
    command = ["bash", "-euo", "pipefail", "-c", BLOCKS[heading]]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    if heading == "GKE":
        assert (home / "called").read_text().startswith("pip\ninstall\nxpk\nkubectl\nlogs\n")
    else:
        assert done.stdout.startswith("activated\n") and "\ntrain\n--config\nconfigs/demo_base.py\n" in done.stdout
