#!/usr/bin/env bash
# Run one command on every worker of a TPU VM: JAX on a pod starts only when all hosts run the same program.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/tpu_vm.sh [options] setup NAME
       launch/tpu_vm.sh [options] train NAME -- TRAIN_ARGUMENTS
       launch/tpu_vm.sh [options] log   NAME
       launch/tpu_vm.sh [options] stop  NAME

NAME is a TPU VM that exists; nothing is created, resized or deleted here. Every command runs on all its workers.

  setup   put the commit --rev of --repo in ~/if_jax and install it with the tpu extra in ~/if_jax-venv
  train   start `if-jax train TRAIN_ARGUMENTS`, detached, so that a lost connection does not end the run;
          the log of each worker is ~/if_jax-train.log
  log     show the last lines of each worker's log
  stop    send the train process SIGTERM, as a preemption does

options:
  --zone ZONE        zone of the TPU VM             (default: gcloud's configuration)
  --project PROJECT  project of the TPU VM          (default: gcloud's configuration)
  --repo URL         where workers clone from       (default: the origin remote of this checkout, as https)
  --rev COMMIT       what they check out            (default: HEAD of this checkout)
  --dry-run          print the gcloud command instead of running it

example:
  gcloud compute tpus tpu-vm create if-pod --zone us-east5-b --accelerator-type v6e-16 --version v2-alpha-tpuv6e
  launch/tpu_vm.sh --zone us-east5-b setup if-pod
  launch/tpu_vm.sh --zone us-east5-b train if-pod -- --config configs/demo_base.py --workdir gs://bucket/runs/base
TEXT
}

die() { printf 'error: %s\n' "$*" >&2; exit 2; }

main() {
  local root zone='' project='' repo='' rev='' dry_run=''
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  while (($#)); do
    case $1 in
      -h | --help) usage; exit 0 ;;
      --dry-run) dry_run=yes; shift ;;
      --zone | --project | --repo | --rev)
        (($# > 1)) && [[ $2 != -* ]] || die "$1 needs a value"
        printf -v "${1#--}" '%s' "$2"
        shift 2
        ;;
      -*) die "unknown option $1: see launch/tpu_vm.sh --help" ;;
      *) break ;;
    esac
  done
  (($#)) || { usage >&2; exit 2; }
  local action=$1 name=${2:-}
  case $action in
    setup | train | log | stop) ;;
    *) die "unknown command \"$action\": setup, train, log or stop" ;;
  esac
  [[ -n $name && $name != -* ]] || die "NAME is missing: launch/tpu_vm.sh $action NAME"
  shift 2

  local remote
  case $action in
    setup)
      remote=$(setup_command "$root" "$repo" "$rev") || exit 2
      ;;
    train)
      [[ ${1:-} == -- ]] || die "\"--\" is missing before the train arguments"
      shift
      check_train_arguments "$root" "$@"
      remote=$(train_command "$@")
      shift $#
      ;;
    log) remote='tail -n 20 ~/if_jax-train.log' ;;
    stop) remote=$(stop_command) ;;
  esac
  (($# == 0)) || die "unexpected argument \"$1\" after $action NAME"
  on_all_workers "$name" "$zone" "$project" "$dry_run" "$remote"
}

# The program the workers run to install. Ubuntu 22.04, the usual TPU VM image, comes with Python 3.10.
setup_command() {
  local root=$1 repo=$2 rev=$3
  if [[ -z $repo ]]; then
    repo=$(git -C "$root" remote get-url origin 2>/dev/null) || die "this checkout has no origin remote: give --repo URL"
    # Workers hold no ssh keys of yours.
    [[ $repo =~ ^(ssh://)?git@([^:/]+)[:/](.+)$ ]] && repo="https://${BASH_REMATCH[2]}/${BASH_REMATCH[3]}"
  fi
  [[ $repo == *://* ]] || die "--repo is \"$repo\": give a URL that the workers can clone"
  if [[ -z $rev ]]; then
    rev=$(git -C "$root" rev-parse HEAD 2>/dev/null) || die "this checkout has no commit: give --rev COMMIT"
    [[ -z $(git -C "$root" status --porcelain) ]] ||
      echo "warning: uncommitted changes stay here; the workers get commit ${rev:0:12}" >&2
  fi
  printf 'set -eu; repo=%q; rev=%q; ' "$repo" "$rev"
  cat <<'REMOTE' | tr '\n' ' '
command -v python3.11 >/dev/null ||
  { sudo apt-get -qq update && sudo apt-get -qq install -y python3.11 python3.11-venv; };
test -d ~/if_jax/.git || git clone -q "$repo" ~/if_jax;
cd ~/if_jax;
git remote set-url origin "$repo";
git fetch -q origin;
git checkout -q --detach "$rev";
test -x ~/if_jax-venv/bin/pip || python3.11 -m venv ~/if_jax-venv;
~/if_jax-venv/bin/pip install -q -e ".[tpu]";
echo "$(hostname): if_jax at $(git rev-parse --short HEAD)"
REMOTE
}

# A run on many hosts needs a recipe they all have and a folder they all see.
check_train_arguments() {
  local root=$1 config='' workdir=''
  shift
  while (($#)); do
    case $1 in
      --config=*) config=${1#*=} ;;
      --workdir=*) workdir=${1#*=} ;;
      --config) config=${2:-} ;;
      --workdir) workdir=${2:-} ;;
    esac
    shift
  done
  [[ -n $config ]] || die "--config is missing: which recipe?"
  [[ -f $root/$config ]] || die "--config $config does not exist in this checkout, so not on the workers"
  [[ $workdir == gs://* ]] || die "--workdir is \"$workdir\": all workers must see it, give a gs:// path"
}

# Refuses to start twice: the second process would find the TPU taken.
train_command() {
  local arguments
  printf -v arguments ' %q' "$@"
  cat <<'REMOTE' | tr '\n' ' '
cd ~/if_jax || { echo "$(hostname): run setup first" >&2; exit 1; };
if test -f ~/if_jax-train.pid && kill -0 "$(cat ~/if_jax-train.pid)" 2>/dev/null;
then echo "$(hostname): a run is going on, stop it first" >&2; exit 1; fi;
REMOTE
  printf 'nohup ~/if_jax-venv/bin/if-jax train%s >~/if_jax-train.log 2>&1 </dev/null & ' "$arguments"
  # shellcheck disable=SC2016  # the worker expands it
  printf '%s' 'echo $! >~/if_jax-train.pid; echo "$(hostname): started, process $!"'
}

stop_command() {
  cat <<'REMOTE' | tr '\n' ' '
if test -f ~/if_jax-train.pid && kill -TERM "$(cat ~/if_jax-train.pid)" 2>/dev/null;
then echo "$(hostname): told to stop";
else echo "$(hostname): no run"; fi
REMOTE
}

on_all_workers() {
  local name=$1 zone=$2 project=$3 dry_run=$4 remote=$5
  local -a where=()  # expanded with ${...+...}: bash before 4.4 (macOS) calls an empty array unbound
  [[ -z $zone ]] || where+=(--zone "$zone")
  [[ -z $project ]] || where+=(--project "$project")
  local -a command=(gcloud compute tpus tpu-vm ssh "$name" ${where[@]+"${where[@]}"} --worker=all --command "$remote")
  if [[ -n $dry_run ]]; then
    printf '%q ' "${command[@]}"
    echo
    return
  fi
  command -v gcloud >/dev/null || die "gcloud not found: install the Google Cloud SDK and run gcloud auth login"
  local state
  state=$(gcloud compute tpus tpu-vm describe "$name" ${where[@]+"${where[@]}"} --format='value(state)') ||
    die "TPU VM \"$name\" was not found: check the name, --zone and --project"
  [[ $state == READY ]] || die "TPU VM \"$name\" is $state, not READY"
  "${command[@]}"
}

main "$@"
