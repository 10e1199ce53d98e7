#!/usr/bin/env bash
# Train under Slurm, on CPUs or GPUs: one task a process, one process a GPU.
#
# usage: sbatch [SBATCH_OPTIONS] launch/slurm.sh TRAIN_ARGUMENTS
#
# From the root of the checkout, with a --workdir that all nodes see. All GPUs of a node have to be visible to all its
# tasks (--gpus-per-node, never --gpus-per-task): JAX picks one by the number of the task on its node.
#
#   sbatch --nodes 2 --ntasks-per-node 4 --gpus-per-node 4 --cpus-per-task 8 --time 24:00:00 launch/slurm.sh \
#     --config configs/demo_base.py --workdir /shared/runs/base --config.mesh.fsdp=8 --config.mesh.rules=fsdp
#
# Three minutes before the time limit, and when the job is preempted, the run saves and ends. The job then goes back into
# the queue and resumes, as it does when a process is lost, stuck or never came, or when a disk, a bucket or a data worker
# failed (exit codes 75 to 78, a signal). It does not after a mistake (1, 2), nor after IF_JAX_RESTARTS (20) times. The
# end: scancel JOB.
#
#   IF_JAX_MODULES   modules to load, such as "python/3.12 cuda/12"
#   IF_JAX_VENV      virtual environment if_jax is installed in
#   IF_JAX_RESTARTS  how often at most
#SBATCH --job-name=if_jax
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@180
set -uo pipefail

die() { printf 'error: %s\n' "$*" >&2; exit 2; }

main() {
  case ${1:-} in
    -h | --help | '') awk 'NR > 1 { if (!/^# ?/ || /^#SBATCH/) exit; sub(/^# ?/, ""); print }' "${BASH_SOURCE[0]}"
      [[ -n ${1:-} ]] && exit 0 || exit 2 ;;
  esac
  [[ -n ${SLURM_JOB_ID:-} ]] ||
    die "this is no Slurm job: $(command -v sbatch >/dev/null || echo "on a machine that has Slurm, ")sbatch launch/slurm.sh $*"
  check_train "$@"
  prepare
  local errors code=0
  errors=$(mktemp)
  # The first task to end must not kill one that still writes its part of a checkpoint: they leave by themselves.
  srun --kill-on-bad-exit=0 --wait=300 --input=none if-jax train "$@" 2> >(tee "$errors" >&2) || code=$?
  sleep 0.2  # tee is still writing
  local mistake=no
  grep -qE 'xited with exit code [12]$' "$errors" && mistake=yes
  rm -f "$errors"
  go_on "$code" "$mistake"
}

check_train() {
  [[ " $*" == *' --config'[=\ ]* ]] || die "--config is missing: which recipe?"
  [[ " $*" == *' --workdir'[=\ ]* ]] || die "--workdir is missing: a folder that all nodes see"
}

prepare() {
  local module
  if [[ -n ${IF_JAX_MODULES:-} ]]; then
    type module >/dev/null 2>&1 ||
      die "IF_JAX_MODULES is \"$IF_JAX_MODULES\", but there is no module command on $(hostname): leave it out, or source modules first"
    for module in $IF_JAX_MODULES; do
      module load "$module" || die "module $module was not loaded on $(hostname): see module avail ${module%%/*}"
    done
  fi
  if [[ -n ${IF_JAX_VENV:-} ]]; then
    [[ -f $IF_JAX_VENV/bin/activate ]] || die "IF_JAX_VENV is $IF_JAX_VENV: no virtual environment on $(hostname)"
    # shellcheck disable=SC1091  # the user's
    source "$IF_JAX_VENV/bin/activate"
  fi
  command -v if-jax >/dev/null ||
    die "if-jax not found on $(hostname): set IF_JAX_VENV, or IF_JAX_MODULES=\"…\" for the module that has it"
  # Since Slurm 22.05 srun does not take this over from sbatch.
  [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
  # Without GPUs of its own a job must not look for any; one device a process.
  if [[ -z ${SLURM_JOB_GPUS:-}${SLURM_GPUS_ON_NODE:-} ]]; then
    export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} JAX_NUM_CPU_DEVICES=${JAX_NUM_CPU_DEVICES:-1}
  fi
}

# Ends with the code of the run, or gives the job back to the queue.
go_on() {
  local code=$1 mistake=$2 times=${SLURM_RESTART_COUNT:-0}
  ((code == 0)) && exit 0
  [[ $mistake == no ]] || { echo "error: a mistake ended the run, see above; the job is not repeated" >&2; exit "$code"; }
  # A job that was cancelled is no longer RUNNING: it stays cancelled.
  [[ $(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T 2>/dev/null) == RUNNING ]] || exit "$code"
  ((times < ${IF_JAX_RESTARTS:-20})) || die "the run has ended with code $code, $times times repeated already"
  echo "ended with code $code: back into the queue, to resume from the newest checkpoint" >&2
  # Slurm itself starts a job that was requeued two minutes later at the earliest, so there is no pause here.
  scontrol requeue "$SLURM_JOB_ID" || die "Slurm refused to requeue job $SLURM_JOB_ID: submit it again, it resumes"
  exit "$code"
}

main "$@"
