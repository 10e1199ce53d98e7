#!/usr/bin/env bash
# Show the last lines of the workers' logs, or follow one.
#
# usage: launch/tpu_vm/logs.sh [--worker N|all] [--lines N] [--follow] [--settings FILE] [--dry-run]
#
# Without --worker: all of them, 20 lines each; with --follow: worker 0, which has the progress bar.

# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

main() {
  local worker='' lines=20 follow=''
  begin "$@"
  set -- ${rest[@]+"${rest[@]}"}
  while (($#)); do
    case $1 in
      --worker) worker=${2:-}; shift ;;
      --worker=*) worker=${1#*=} ;;
      --lines) lines=${2:-}; shift ;;
      --lines=*) lines=${1#*=} ;;
      --follow) follow=yes ;;
      *) no_more_arguments "$1" ;;
    esac
    (($#)) && shift
  done
  [[ -n $worker ]] || worker=$([[ -n $follow ]] && echo 0 || echo all)
  [[ $worker =~ ^([0-9]+|all)$ ]] || die "--worker is \"$worker\": give a number, or all"
  [[ $lines =~ ^[0-9]+$ ]] || die "--lines is \"$lines\": give a number"
  need_ready
  [[ $worker == all || $worker -lt $count ]] || die "--worker is $worker: there are 0…$((count - 1))"
  if [[ -n $follow ]]; then
    [[ $worker != all ]] || die "--follow shows one worker: give --worker N"
    on_workers "$worker" '' follow || die "$(reason)"
  else
    on_workers "$worker" '' log "$lines" || fail "worker(s) did not answer: $(reason)"
  fi
}

main "$@"
