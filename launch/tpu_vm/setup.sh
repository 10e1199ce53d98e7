#!/usr/bin/env bash
# Put the same commit on all workers of the slice and install it there.
#
# usage: launch/tpu_vm/setup.sh [--rev COMMIT] [--settings FILE] [--dry-run]
#
# Every worker clones REPO into ~/if_jax, checks out REV (or --rev) and installs it with the tpu extra in ~/if_jax-venv.
# May be called again at any time; a checkout or an environment that is there is brought up to date.
#
# Then each worker reads a sample of what TRAIN trains on, where that lies in a bucket: whether it may, in which region the
# bucket is, and how many MB/s come.

# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

main() {
  begin "$@"
  set -- ${rest[@]+"${rest[@]}"}
  if [[ ${1:-} == --rev ]]; then
    (($# > 1)) || die "--rev needs a commit"
    REV=$2
    shift 2
  fi
  no_more_arguments "$@"
  local repo rev answer bad
  repo=$(repository)
  rev=$(commit)
  [[ -n $REV || -z $(git -C "$root" status --porcelain 2>/dev/null) ]] ||
    echo "warning: uncommitted changes stay here; the workers get commit ${rev:0:12}" >&2
  need_ready
  say "installing ${rev:0:12} on $count worker(s): some minutes"
  answer=$(ask "worker 0: ready at $rev" tpu-vm ssh "$NAME" --worker=all "--command=$(get "$repo" "$rev")" \
    --ssh-flag=-oConnectTimeout=20 --ssh-flag=-oServerAliveInterval=20 ${SSH_FLAGS[@]+"${SSH_FLAGS[@]}"}) || true
  bad=$(without 'ready at ' "$answer")
  if [[ -n $bad ]]; then
    fail "setup failed on worker(s) $bad of $count: $(why "$answer"); mend it and call $(how setup) again"
  fi
  say "all $count worker(s) are at ${rev:0:12}"
  look_at_data ${TRAIN[@]+"${TRAIN[@]}"}
  say "next: $(how run)"
}

# What each worker reads of the data. A run that could not read it has cost a start.
look_at_data() {
  [[ -n $(value_of --config "$@") ]] || return 0
  local answer bad
  answer=$(on_workers all 'worker 0: data gs://bucket: as a worker sees it' data "$@") || true
  grep -E '^worker [0-9]+: data (speed|region)' <<<"$answer" | sort -u >&2 || true
  bad=$(without 'data' "$answer")
  [[ -z $bad ]] || fail "worker(s) $bad of $count cannot read the data: $(why "$answer"); mend it and call $(how setup) again"
}

# Workers hold no ssh keys of yours.
repository() {
  local repo=$REPO
  [[ -n $repo ]] || repo=$(git -C "$root" remote get-url origin 2>/dev/null) ||
    die "this checkout has no origin remote: set REPO"
  [[ $repo =~ ^(ssh://)?git@([^:/]+)[:/](.+)$ ]] && repo="https://${BASH_REMATCH[2]}/${BASH_REMATCH[3]}"
  [[ $repo == *://* ]] || die "REPO is \"$repo\": give a URL that the workers can clone"
  printf '%s' "$repo"
}

# The program that brings the checkout to a worker, whose worker.sh then installs it.
get() {
  printf 'repo=%s; rev=%s\n' "$(quoted "$1")" "$(quoted "$2")"
  cat <<'REMOTE'
bad() { echo "worker ${HOSTNAME##*-w-}: error: $1"; exit 1; }
test -d if_jax/.git || git clone -q "$repo" if_jax || bad "git clone $repo failed"
cd if_jax && git remote set-url origin "$repo" || bad "~/if_jax is no checkout"
git cat-file -e "$rev^{commit}" 2>/dev/null || git fetch -q origin || bad "git fetch $repo failed"
git checkout -q --detach "$rev" || bad "commit $rev is not in $repo: push it"
bash launch/tpu_vm/worker.sh install
REMOTE
}

main "$@"
