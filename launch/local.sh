#!/usr/bin/env bash
# Run the train command on this machine as if it had N devices: a smoke test of sharding before renting them.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/local.sh N -- TRAIN_ARGUMENTS

Runs `python -m if_jax train TRAIN_ARGUMENTS` with N fake CPU devices. It checks that a recipe shards, steps and
saves; it is not faster than one device.

example:
  launch/local.sh 8 -- --config configs/demo_base.py --workdir runs/smoke --config.steps=2
TEXT
}

die() { printf 'error: %s\n' "$*" >&2; exit 2; }

case ${1:-} in
  -h | --help) usage; exit 0 ;;
  '') usage >&2; exit 2 ;;
esac

devices=$1
shift
[[ $devices =~ ^[1-9][0-9]*$ ]] || die "N is \"$devices\": give a number of devices, 1 or more"
[[ ${1:-} == -- ]] || die "\"--\" is missing between N and the train arguments: launch/local.sh $devices -- $*"
shift
(($#)) || die "no train arguments: give at least --config and --workdir"

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
command -v "$python" >/dev/null || die "$python not found: activate the environment if_jax is installed in, or set PYTHON"

JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$devices exec "$python" -m if_jax train "$@"
