#!/usr/bin/env bash
# Delete the slice and its request, after the run has saved. The run folder (gs://…) stays.
#
# usage: launch/tpu_vm/delete.sh [--yes] [--now] [--settings FILE] [--dry-run]
#
#   --yes   do not ask
#   --now   do not wait for the run to save (up to five minutes)

# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

main() {
  local yes='' now='' word state
  begin "$@"
  for word in ${rest[@]+"${rest[@]}"}; do
    case $word in
      --yes) yes=yes ;;
      --now) now=yes ;;
      *) no_more_arguments "$word" ;;
    esac
  done
  state=$(request_state ACTIVE)
  [[ $state != UNKNOWN ]] || fail "$(reason)"
  confirm "$yes" "$state"
  [[ -n $now || $state != ACTIVE || $(node_state READY) != READY ]] || save
  if [[ $state != MISSING ]]; then
    delete_request || fail "$(reason)"
  fi
  # A slice can outlive its request, and one made without a request has none.
  case $(node_state MISSING) in
    MISSING) ;;
    UNKNOWN) fail "$(reason)" ;;
    *) cloud tpu-vm delete "$NAME" >&2 || fail "the request is gone, TPU $NAME is not: $(reason)" ;;
  esac
  say "TPU $NAME is deleted; what is in --workdir stays, and its storage costs money"
}

confirm() {
  [[ -z $1 && -z $dry_run ]] || return 0
  [[ -t 0 ]] || die "nobody to ask: give --yes to delete TPU $NAME ($2) in $ZONE"
  local reply
  read -r -p "delete TPU $NAME ($TYPE, $2) in $ZONE? [y/N] " reply
  [[ $reply == [yY]* ]] || die "not deleted"
}

save() {
  local answer
  answer=$(on_workers all 'worker 0: stopped' stop 300) || say "not all workers answered, deleting all the same"
  [[ -z $answer ]] || printf '%s\n' "$answer" >&2
}

main "$@"
