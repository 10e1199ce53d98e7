"""launch/gke.sh and launch/slurm.sh against stand-ins for xpk, kubectl, srun, scontrol and squeue; docs/launch.md."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPE = "configs/demo_base.py"
TRAIN = ["--config", RECIPE, "--workdir=gs://bucket/run 1"]
WHERE = ["--cluster", "c", "--workload", "w", "--zone", "us-east5-b", "--project", "p"]

# Accepts the flags of xpk 1.16 that are of use here, and notes its words.
XPK = """#!/bin/bash
printf '%s\\n' "$@" >"$HOME/xpk"
verb="$1 $2"; shift 2
case $verb in
  "workload create") known=" --workload --cluster --zone --project --tpu-type --num-slices --docker-image
    --base-docker-image --script-dir --command --max-restarts --restart-on-exit-codes
    --termination-grace-period-seconds " ;;
  "workload list") known=" --cluster --zone --project --filter-by-job " ;;
  "workload delete") known=" --workload --cluster --zone --project --force " ;;
  *) exit 2 ;;
esac
while (($#)); do
  [[ $known == *[[:space:]]"$1"[[:space:]]* ]] || { echo "unrecognized arguments: $1" >&2; exit 2; }
  [[ $1 == --force ]] && { shift; continue; }
  shift 2 || exit 2
done
exit "${XPK_CODE:-0}"
"""
NOTE = '#!/bin/bash\nprintf "%s\\n" "$(basename "$0")" "$@" >>"$HOME/called"\n'
SRUN = NOTE + 'shift 3; "$@"; code=$?; ((code)) && echo "srun: error: n: task 0: Exited with exit code $code" >&2\n'
SRUN += "exit $code\n"
SQUEUE = '#!/bin/bash\necho "${JOB_STATE:-RUNNING}"\n'
IF_JAX = '#!/bin/bash\nenv | grep -E "^(JAX|SRUN)_" | sort; printf "%s\\n" "$@"\nexit "${CODE:-0}"\n'


@pytest.fixture
def home(tmp_path):
    (tmp_path / "bin").mkdir()
    programs = {"xpk": XPK, "kubectl": NOTE, "srun": SRUN, "scontrol": NOTE, "squeue": SQUEUE, "if-jax": IF_JAX}
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def launch(home: Path, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {"HOME": str(home), "PATH": f"{home}/bin:/usr/local/bin:/usr/bin:/bin", **variables}
    command = ["bash", str(ROOT / "launch" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, cwd=home)


def words(home: Path) -> list[str]:
    return (home / "xpk").read_text().splitlines()


def test_gke_runs_one_jobset_that_restarts_on_losses_but_not_on_mistakes(home):
    done = launch(home, "gke.sh", "run", *WHERE, "--type", "v6e-16", "--", *TRAIN)
    assert done.returncode == 0 and "cost money until you delete the cluster" in done.stderr, done.stderr
    called = words(home)
    assert called[:2] == ["workload", "create"]
    for flag, value in (
        ("--restart-on-exit-codes", "75,76,77,78"),
        ("--tpu-type", "v6e-16"),
        ("--script-dir", str(ROOT)),
    ):
        assert called[called.index(flag) + 1] == value
    command = called[called.index("--command") + 1]
    assert command.endswith(f"&& exec if-jax train --config {RECIPE} '--workdir=gs://bucket/run 1'")
    launch(home, "gke.sh", "run", *WHERE, "--type", "v6e-16", "--image", "i", "--", *TRAIN)
    assert words(home)[words(home).index("--docker-image") + 1] == "i" and "--script-dir" not in words(home)


def test_gke_status_logs_delete_and_dry_run(home):
    assert launch(home, "gke.sh", "status", "--cluster", "c").returncode == 0
    assert words(home) == ["workload", "list", "--cluster", "c"]
    assert launch(home, "gke.sh", "logs", "--workload", "w").returncode == 0
    assert "jobset.sigs.k8s.io/jobset-name=w," in (home / "called").read_text()
    deleted = launch(home, "gke.sh", "delete", *WHERE)
    assert deleted.returncode == 0 and "go on costing money: xpk cluster delete --cluster c" in deleted.stderr
    (home / "xpk").unlink()
    shown = launch(home, "gke.sh", "run", *WHERE, "--type", "v6e-16", "--dry-run", "--", *TRAIN)
    assert shown.stdout.startswith("xpk workload create --workload w") and not (home / "xpk").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], 'unknown command "fly"'),
        (["run", "--clutser", "c"], "unknown option --clutser"),
        (["run", "--workload", "w"], "--cluster is missing"),
        (["run", "--cluster", "c"], "--workload is missing"),
        (["run", "--cluster"], "--cluster needs a value"),
        (["run", *WHERE, "--", *TRAIN], "--type is missing"),
        (["run", *WHERE, "--type", "v6e-16"], '"--" is missing'),
        (["run", *WHERE, "--type", "v6e-16", "--restarts", "x", "--", *TRAIN], '--restarts is "x"'),
        (["run", *WHERE, "--type", "v6e-16", "--", "--workdir", "gs://b/r"], "--config is missing"),
        (["run", *WHERE, "--type", "v6e-16", "--", "--config", "no.py"], "no.py does not exist"),
        (["run", *WHERE, "--type", "v6e-16", "--", "--config", RECIPE, "--workdir", "r"], '--workdir is "r"'),
        (["status", "--cluster", "c", "--", "x"], 'unexpected argument "x"'),
    ],
)
def test_gke_refuses_mistakes_in_one_line(home, arguments, message):
    refused = launch(home, "gke.sh", *arguments)
    assert refused.returncode == 2 and message in refused.stderr and refused.stderr.count("\n") == 1
    assert not (home / "xpk").exists()


def test_gke_without_xpk_and_with_one_that_refuses(home):
    refused = launch(home, "gke.sh", "run", *WHERE, "--type", "v6e-16", "--", *TRAIN, XPK_CODE="1")
    assert refused.returncode == 2 and "xpk refused the workload" in refused.stderr
    (home / "bin/xpk").unlink()
    assert "xpk not found: pip install xpk" in launch(home, "gke.sh", "status", "--cluster", "c").stderr


JOB = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "8"}
SLURM = ["--config", RECIPE, "--workdir", "/shared/run"]


def _called(home: Path) -> str:
    return (home / "called").read_text() if (home / "called").exists() else ""


def test_slurm_runs_a_task_a_process(home):
    done = launch(home, "slurm.sh", *SLURM, **JOB)
    assert done.returncode == 0, done.stderr
    expected = ["JAX_NUM_CPU_DEVICES=1", "JAX_PLATFORMS=cpu", "SRUN_CPUS_PER_TASK=8", "train", *SLURM]
    assert done.stdout.splitlines() == expected
    assert "scontrol" not in _called(home)
    on_gpus = launch(home, "slurm.sh", *SLURM, SLURM_GPUS_ON_NODE="4", **JOB)
    assert "JAX_PLATFORMS" not in on_gpus.stdout
    options = re.findall(r"^#SBATCH (\S+)$", (ROOT / "launch/slurm.sh").read_text(), re.MULTILINE)
    assert {"--requeue", "--signal=TERM@180", "--open-mode=append"} <= set(options)


@pytest.mark.parametrize("code", ["75", "76", "77", "143", "137"])
def test_slurm_requeues_a_run_that_can_go_on(home, code):
    done = launch(home, "slurm.sh", *SLURM, CODE=code, **JOB)
    assert done.returncode == int(code) and "scontrol\nrequeue\n7\n" in _called(home)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"CODE": "1"}, "the job is not repeated"),
        ({"CODE": "2"}, "the job is not repeated"),
        ({"CODE": "143", "JOB_STATE": "COMPLETING"}, ""),  # scancel
        ({"CODE": "75", "SLURM_RESTART_COUNT": "20"}, "20 times repeated already"),
    ],
)
def test_slurm_does_not_requeue(home, variables, message):
    done = launch(home, "slurm.sh", *SLURM, **variables, **JOB)
    assert done.returncode != 0 and message in done.stderr and "scontrol" not in _called(home)


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (SLURM, {}, "sbatch launch/slurm.sh --config"),  # where there is no sbatch, it says so before
        (SLURM[2:], JOB, "--config is missing"),
        (SLURM[:2], JOB, "--workdir is missing"),
        (SLURM, {"IF_JAX_MODULES": "cuda/12", **JOB}, "there is no module command"),
        (SLURM, {"IF_JAX_VENV": "/nowhere", **JOB}, "IF_JAX_VENV is /nowhere: no virtual environment"),
    ],
)
def test_slurm_refuses_mistakes_in_one_line(home, arguments, variables, message):
    refused = launch(home, "slurm.sh", *arguments, **variables)
    assert refused.returncode == 2 and message in refused.stderr and refused.stderr.count("\n") == 1


def test_slurm_with_modules(home):
    """`module` is a function that a site exports."""
    function = '() { [[ $2 == python/3 ]] || return 1; echo "loaded $2"; }'
    variables = {"BASH_FUNC_module%%": function, **JOB}
    assert "loaded python/3" in launch(home, "slurm.sh", *SLURM, IF_JAX_MODULES="python/3", **variables).stdout
    refused = launch(home, "slurm.sh", *SLURM, IF_JAX_MODULES="python/3 cuda/99", **variables)
    assert refused.returncode == 2 and "module cuda/99 was not loaded" in refused.stderr
    (home / "bin/if-jax").unlink()
    assert "if-jax not found on" in launch(home, "slurm.sh", *SLURM, **JOB).stderr


def test_the_table_of_meshes_is_that_of_the_recipes():
    """Every cell of docs/launch.md: mesh and accumulation of the recipe's docstring, and what that leaves a chip."""
    table = (ROOT / "docs/launch.md").read_text()
    rows = re.findall(r"^\| (?:IF-)?(I+-\w+), batch (\d+) \| (\d+) \|(.*)\|$", table, re.MULTILINE)
    printed = {(stage, chips): (int(batch), cells) for stage, batch, chips, cells in rows}
    for path in sorted((ROOT / "configs").glob("if_*.py")):
        text = path.read_text()
        batch = int(re.search(r'"batch_size": (\d+)', text)[1])
        for chips, cells in re.findall(r"^\| (\d+) chips[^|]*\|(.*)\|$", text, re.MULTILINE):
            said, shown = printed.pop((path.stem.removeprefix("if_").replace("_", "-"), chips))
            meshes = [cell.strip() for cell in cells.split("|")]
            per_chip = [batch / int(chips) / int(mesh.split(", ")[1]) for mesh in meshes]
            pairs = zip(meshes, per_chip, strict=True)
            assert [cell.strip() for cell in shown.split("|")] == [f"{mesh}: {each:g}" for mesh, each in pairs]
            assert said == batch
    assert not printed
