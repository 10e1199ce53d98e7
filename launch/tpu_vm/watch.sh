#!/usr/bin/env bash
# Keep a run going until it ends: create the slice, set it up, start the run, and do so again when it is preempted.
#
# usage: launch/tpu_vm/watch.sh [--delete] [--settings FILE] [--dry-run]
#
#   --delete   delete the slice once the run has ended well
#
# Runs on your machine (tmux); ending it changes nothing on the slice, and calling it again goes on. A slice that was
# preempted, or of which a worker no longer answers, is replaced and gets the same commit, and the run resumes from its
# newest checkpoint. A process that was lost, got stuck or never came, or met what may pass (exit codes 75, 76, 77, 78,
# 143, a signal) makes all start again; a run that ended within ten minutes of its start waits first, each time twice as
# long. A mistake (exit code 1 or 2) ends the watch, and so do a request that fails three times and a run that ends five
# times within ten minutes of its start.

# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

main() {
  delete_after='' silent=0 reached='' started=-600 quick=0 tries=0 leaving=0 before=''
  begin "$@"
  [[ ${rest[*]-} != --delete ]] || { delete_after=yes; rest=(); }
  no_more_arguments ${rest[@]+"${rest[@]}"}
  rev=$(commit)  # stays the same however long this takes
  [[ -z $dry_run ]] || { show; exit 0; }
  trap 'echo >&2; say "the watch ends, the slice and the run go on"; costs; exit 130' INT TERM
  while true; do
    look_at_request
    sleep "$POLL_SECONDS"
  done
}

# --dry-run: one look, and what follows a preemption.
show() {
  request_state ACTIVE >/dev/null
  node_state READY >/dev/null
  worker_count >/dev/null
  on_workers all '' status >/dev/null
  echo "# after a preemption:" >&3
  delete_request
  other create
  other setup --rev "$rev"
  other run
  echo "# when a process was lost:" >&3
  on_workers all '' end 60 >/dev/null
  other run
}

look_at_request() {
  local state
  state=$(request_state ACTIVE)
  case $state in
    ACTIVE) look_at_node ;;
    MISSING) [[ -z $reached ]] || fail "the slice is gone: somebody has deleted it"; create ;;
    SUSPENDED | FAILED) replace "the request is $state" ;;
    UNKNOWN) news "gcloud does not answer: $(reason)" ;;
    *) news "the request is $state" ;;
  esac
}

look_at_node() {
  local state
  state=$(node_state READY)
  case $state in
    READY) look_at_workers ;;
    PREEMPTED | TERMINATED | MISSING) replace "the TPU is $state" ;;
    STOPPED) fail "TPU $NAME is STOPPED: start it (gcloud compute tpus tpu-vm start), or delete it" ;;
    *) news "the TPU is $state" ;;
  esac
}

look_at_workers() {
  local answer quiet
  count=$(worker_count) || return 0
  answer=$(on_workers all '' status | sort -s -k 2,2n) || true
  quiet=$(without '' "$answer")
  if [[ -n $quiet ]]; then
    silent=$((silent + 1))
    say "worker(s) $quiet of $count do not answer ($silent of 5): $(reason)"
    ((silent < 5)) || unreachable "$quiet"
    return 0
  fi
  silent=0 reached=yes
  decide "$answer"
}

# Never delete a slice because of one's own network or keys: only one that has answered before.
unreachable() {
  [[ -n $reached ]] || fail "worker(s) $1 of $count never answered: check ssh (firewall for port 22, SSH_FLAGS)"
  replace "worker(s) $1 no longer answer"
}

# What to do, from one line of each worker.
decide() {
  local codes
  codes=$(sed -n 's/^worker [0-9]*: ended \([0-9]*\).*/\1/p' <<<"$1" | sort -nu | paste -sd ' ' -)
  case $1 in
    *': empty'* | *': idle'*) set_up_and_run; return ;;
    *': stopped '*) say "the run was stopped by hand; run.sh resumes it"; costs; exit 0 ;;
    *': lost'*) again "a worker was started again"; return ;;
  esac
  if [[ -n $codes && $codes != 0 && $1 == *': running'* ]] && ((leaving < 10)); then
    leaving=$((leaving + 1))  # the others leave by themselves, some after the last bytes of a checkpoint
    news "exit codes $codes; waiting for the other workers to leave"
    return
  fi
  leaving=0
  case $codes in
    '' | 0) [[ -n $(without 'ended 0:' "$1") ]] || finish; news "$(head -n 1 <<<"$1" | cut -c 1-160)" ;;
    *) if only_a_mistake "$codes"; then mistake "$1"; else again "exit codes $codes"; fi ;;
  esac
}

# One process ended with 1 or 2, the others because of it. One that was killed can make the others say 1 as well.
only_a_mistake() {
  local code result=1
  for code in $1; do
    case $code in
      1 | 2) result=0 ;;
      0 | 75 | 76 | 77 | 143) ;;
      *) return 1 ;;
    esac
  done
  return "$result"
}

finish() {
  say "the run has ended well on all $count worker(s)"
  if [[ -n $delete_after ]]; then other delete --yes --now; else costs; fi
  exit 0
}

mistake() {
  local line
  line=$(grep -m 1 -E '^worker [0-9]*: ended [12]:' <<<"$1")
  on_workers all '' end 60 >/dev/null || true
  fail "the run ended with a mistake, $line"
}

# All processes again, on the slice as it is.
again() {
  quick=$((SECONDS - started < 600 ? quick + 1 : 1))
  ((quick < 5)) || fail "the run ended five times within ten minutes of its start, last with $1: $(how logs)"
  say "$1: starting all processes again"
  on_workers all '' end 60 >/dev/null || true
  ((quick < 2)) || pause $((1 << (quick - 2)))
  start_run
}

# As long as so many looks take: what failed has time to pass.
pause() {
  local i
  for ((i = 0; i < $1; i++)); do sleep "$POLL_SECONDS"; done
}

set_up_and_run() {
  if ! other setup --rev "$rev"; then
    tries=$((tries + 1))
    ((tries < 3)) || fail "setup failed three times"
    return 0
  fi
  start_run
}

start_run() {
  if other run; then
    started=$SECONDS tries=0
  else
    tries=$((tries + 1))
    ((tries < 3)) || fail "the run did not start three times"
  fi
}

replace() {
  say "$1: replacing the slice; the run resumes from its newest checkpoint"
  delete_request || { news "not deleted: $(reason)"; return 0; }
  create
}

create() {
  silent=0 reached=''
  if ! other create; then
    tries=$((tries + 1))
    ((tries < 3)) || fail "the slice was refused three times"
  fi
}

# Says a thing once, not at every look.
news() {
  [[ $1 == "$before" ]] || say "$1"
  before=$1
}

main "$@"
