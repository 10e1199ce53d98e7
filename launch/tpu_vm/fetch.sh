#!/usr/bin/env bash
# Copy the run folder and the workers' logs to this machine.
#
# usage: launch/tpu_vm/fetch.sh [--out DIR] [--checkpoints] [--settings FILE] [--dry-run]
#
# DIR (fetched/NAME) gets run/, which is --workdir without its checkpoints unless --checkpoints is given, and
# worker-N.log where the slice still exists. Metrics and samples can be looked at while the run goes on.

# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

main() {
  local out='' checkpoints=''
  begin "$@"
  set -- ${rest[@]+"${rest[@]}"}
  while (($#)); do
    case $1 in
      --out) (($# > 1)) || die "--out needs a folder"; out=$2; shift ;;
      --out=*) out=${1#*=} ;;
      --checkpoints) checkpoints=yes ;;
      *) no_more_arguments "$1" ;;
    esac
    shift
  done
  out=${out:-fetched/$NAME}
  [[ -n $dry_run ]] || mkdir -p "$out/run" || die "--out $out cannot be written"
  fetch_run "$out/run" "$(workdir ${TRAIN[@]+"${TRAIN[@]}"})" "$checkpoints"
  fetch_logs "$out"
}

workdir() {
  while (($#)); do
    case $1 in
      --workdir=*) echo "${1#*=}" ;;
      --workdir) echo "${2:-}" ;;
    esac
    shift
  done
}

fetch_run() {
  local -a command=(gcloud storage rsync --recursive)
  [[ $2 == gs://* ]] || die "TRAIN has --workdir \"$2\": give the gs:// path of the run"
  [[ -n $3 ]] || command+=('--exclude=^checkpoints/.*')
  [[ -z $PROJECT ]] || command+=("--project=$PROJECT")
  show_or_run "${command[@]}" --quiet "$2" "$1" || die "$2 was not fetched: $(reason)"
  say "$2 is in $1"
}

fetch_logs() {
  local i bad=''
  [[ $(node_state READY) == READY ]] || { say "no TPU $NAME is READY: no logs of workers"; return; }
  count=$(worker_count) || die "$(reason)"
  for ((i = 0; i < count; i++)); do  # gcloud copies from one worker at a time
    cloud tpu-vm scp "$NAME:if_jax-run/log" "$1/worker-$i.log" "--worker=$i" >&2 || bad+=" $i"
  done
  [[ -z $bad ]] || die "no log from worker(s)$bad of $count: $(reason)"
  say "the logs of $count worker(s) are in $1"
}

main "$@"
