#!/usr/bin/env bash
# Tell the run to save and end, on all workers. The slice stays, and costs money.
#
# usage: launch/tpu_vm/stop.sh [--seconds N] [--settings FILE] [--dry-run]
#
# Waits up to N seconds (300) for the checkpoint. run.sh resumes from it.

# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

main() {
  local seconds=300 answer bad
  begin "$@"
  set -- ${rest[@]+"${rest[@]}"}
  if [[ ${1:-} == --seconds ]]; then
    seconds=${2:-}
    [[ $seconds =~ ^[0-9]+$ ]] || die "--seconds is \"$seconds\": give a number"
    shift 2
  fi
  no_more_arguments "$@"
  need_ready
  answer=$(on_workers all 'worker 0: stopped' stop "$seconds") || true
  printf '%s\n' "$answer"
  bad=$(without '(stopped|no run|empty)' "$answer")
  [[ -z $bad ]] || fail "the run goes on, on worker(s) $bad of $count"
  costs
}

main "$@"
