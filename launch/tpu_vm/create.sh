#!/usr/bin/env bash
# Ask for a TPU slice, and wait until it is there.
#
# usage: launch/tpu_vm/create.sh [--no-wait] [--settings FILE] [--dry-run]
#
# The request goes into Google's queue and is granted when there is room; from that moment it costs money, until
# delete.sh. Interrupting this script leaves the request in the queue: call it again to wait on, or delete.sh to take it
# back. A request of that name that has failed or was preempted is replaced.

# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

main() {
  local wait=yes
  begin "$@"
  [[ ${rest[*]-} != --no-wait ]] || { wait=''; rest=(); }
  no_more_arguments ${rest[@]+"${rest[@]}"}
  local state
  trap 'echo >&2; costs; exit 130' INT
  state=$(request_state MISSING)
  case $state in
    FAILED | SUSPENDED) delete_request || fail "$(reason)"; request ;;
    MISSING) request ;;
    UNKNOWN) die "$(reason)" ;;
    *) say "the request $NAME exists and is $state" ;;
  esac
  [[ -n $wait ]] || { costs; exit 0; }
  await
  say "TPU $NAME ($TYPE) is up; next: $(how setup)"
  costs
}

request() {
  local image=$RUNTIME
  [[ -n $image ]] || image=$(runtime)
  local -a flags=("--node-id=$NAME" "--accelerator-type=$TYPE" "--runtime-version=$image")
  case $TIER in
    spot | reserved) flags+=("--$TIER") ;;
  esac
  cloud queued-resources create "$NAME" "${flags[@]}" ${CREATE_FLAGS[@]+"${CREATE_FLAGS[@]}"} >&2 || fail "$(reason)"
}

# The image Google's documentation gives for JAX on a type.
runtime() {
  case $TYPE in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v[234]-*) echo tpu-ubuntu2204-base ;;
    *) die "RUNTIME is missing: no usual image is known for TYPE $TYPE; gcloud compute tpus tpu-vm versions list" ;;
  esac
}

await() {
  local state before='' node=''
  while true; do
    state=$(request_state ACTIVE)
    [[ $state != ACTIVE ]] || node=$(node_state READY)
    [[ $state/$node == "$before" ]] || say "request: $state${node:+, TPU: $node}"
    before=$state/$node
    case $state/$node in
      ACTIVE/READY) return ;;
      FAILED/*) fail "the request $NAME has failed: $(why_failed)" ;;
      SUSPENDED/* | ACTIVE/PREEMPTED | ACTIVE/TERMINATED) fail "TPU $NAME was preempted: $(how create), or watch.sh" ;;
      MISSING/*) fail "the request $NAME is gone: somebody has deleted it" ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

why_failed() {
  local said
  said=$(ask '' queued-resources describe "$NAME" '--format=value(state.failedData.error.message)') || said=''
  printf '%s' "${said:-no reason is given}"
  remedy <<<"$said"
}

main "$@"
