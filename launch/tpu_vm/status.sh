#!/usr/bin/env bash
# Show the request, the slice, what each worker does, and what it has cost.
#
# usage: launch/tpu_vm/status.sh [--settings FILE] [--dry-run]

# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

main() {
  begin "$@"
  no_more_arguments ${rest[@]+"${rest[@]}"}
  local state node='' answer silent
  state=$(request_state ACTIVE)
  [[ $state != UNKNOWN ]] || die "$(reason)"
  [[ $state != ACTIVE ]] || node=$(node_state READY)
  echo "request $NAME: $state"
  [[ -z $node ]] || echo "TPU $NAME ($TYPE, $TIER, $ZONE): $node"
  if [[ $node == READY ]]; then
    count=$(worker_count) || die "$(reason)"
    answer=$(on_workers all 'worker 0: idle' status) || true
    printf '%s\n' "$answer" | sort -k 2 -n
    silent=$(without '' "$answer")
    [[ -z $silent ]] || echo "worker(s) $silent of $count do not answer: $(reason)"
    bill
  fi
  costs
}

# Hours since the slice was created, times chips, times the user's own price.
bill() {
  local since chips=${TYPE##*-}
  since=$(ask '' tpu-vm describe "$NAME" '--format=value(createTime.date(format="%s"))') || return 0
  [[ -n $since ]] || return 0
  case $TYPE in
    v[234]-* | v5p-*) chips=$((chips / 2)) ;;  # these are counted in cores, two to a chip
  esac
  awk -v from="$since" -v now="$(date +%s)" -v chips="$chips" -v price="$PRICE" 'BEGIN {
    hours = (now - from) / 3600
    printf "up for %.2f h on %d chips: %.1f chip-hours", hours, chips, hours * chips
    if (price != "") printf ", %.2f at your %s an hour and chip", hours * chips * price, price
    print ""
  }'
}

main "$@"
