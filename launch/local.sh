#!/usr/bin/env bash
# Run `if-jax train` or `if-jax embed` as N real processes on this machine, and again when one of them ends badly.
set -euo pipefail

# shellcheck source=arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"

usage() {
  cat <<'TEXT'
usage: launch/local.sh N [train] -- TRAIN_ARGUMENTS
       launch/local.sh N embed -- EMBED_ARGUMENTS

Runs N processes of `python -m if_jax train TRAIN_ARGUMENTS`, one CPU device each unless JAX_PLATFORMS says otherwise.
When one is lost the others are stopped and all start again, from the newest checkpoint or with the shards that are not
complete. A mistake in the recipe, the data or the command (exit code 1 or 2) is not tried again, and neither is a run
that fails five times in a row before a minute is over. Before each further try it waits longer: IF_JAX_PAUSE (5)
seconds, twice as long, and so on.

Process 0 writes to the terminal, the others to launch-I.log in the folder of the run (--workdir) or beside the cache
(--out).

example:
  launch/local.sh 2 -- --config configs/demo_base.py --workdir runs/two --config.mesh.fsdp=2 --config.mesh.rules=fsdp
  launch/local.sh 2 embed -- --config configs/demo_sr.py --config.data.source=data/mine --out data/mine-t5
TEXT
}

die() { printf 'error: %s\n' "$*" >&2; exit 2; }

main() {
  case ${1:-} in
    -h | --help) usage; exit 0 ;;
    '') usage >&2; exit 2 ;;
  esac
  count=$1
  shift
  [[ $count =~ ^[1-9][0-9]*$ ]] || die "N is \"$count\": give a number of processes, 1 or more"
  command=train
  [[ ${1:-} != train && ${1:-} != embed ]] || { command=$1; shift; }
  [[ ${1:-} == -- ]] || die "\"--\" is missing between N and the arguments of $command: launch/local.sh $count -- $*"
  shift
  local option=--workdir folder
  [[ $command == train ]] || option=--out
  (($#)) || die "no $command arguments: give at least --config and $option"
  folder=$(value_of "$option" "$@")
  [[ -n $folder ]] || die "$option is missing: the folder of the $([[ $command == train ]] && echo run || echo cache)"

  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  python=${PYTHON:-python}
  command -v "$python" >/dev/null \
    || die "$python not found: activate the environment if_jax is installed in, or set PYTHON"
  logs=$folder
  [[ $command == train ]] || logs=$(dirname "$folder")  # the cache itself comes whole
  [[ $folder == *://* ]] && logs=.
  mkdir -p "$logs"
  export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} JAX_NUM_CPU_DEVICES=${JAX_NUM_CPU_DEVICES:-1}
  pids=()
  trap 'stop TERM; exit 143' TERM INT
  supervise "$@"
}

supervise() {
  local code started quick=0 pause=${IF_JAX_PAUSE:-5}
  while true; do
    started=$SECONDS
    start "$@"
    code=0
    wait_for_all || code=$?
    ((code == 0)) && exit 0
    stop KILL
    ((code == 1 || code == 2 || code == 130)) && exit "$code"
    quick=$((SECONDS - started < 60 ? quick + 1 : 0))
    ((quick < 5)) || { printf 'error: ended %s times in a row within a minute, last with code %s: see %s\n' \
      "$quick" "$code" "$logs/launch-*.log" >&2; exit "$code"; }
    printf '%s: one of %s processes ended with code %s; starting again\n' "$(date '+%F %T')" "$count" "$code" >&2
    sleep $((quick ? pause << (quick - 1) : 0)) & wait $!  # so that a signal is heard meanwhile
  done
}

start() {
  local port i
  port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
  pids=()
  for ((i = 0; i < count; i++)); do
    local joined=(--coordinator "localhost:$port" --processes "$count" --process "$i")
    if ((i)); then
      "$python" -m if_jax "$command" "$@" "${joined[@]}" >>"$logs/launch-$i.log" 2>&1 &
    else
      "$python" -m if_jax "$command" "$@" "${joined[@]}" &
    fi
    pids+=($!)
  done
}

# Waits until every process has ended well, or one has not: its exit code.
wait_for_all() {
  local i
  for ((i = 0; i < count; i++)); do
    wait -n || return $?
  done
}

stop() {
  local pid
  for pid in "${pids[@]}"; do
    kill "-$1" "$pid" 2>/dev/null || true
  done
  wait "${pids[@]}" 2>/dev/null || true
}

main "$@"
