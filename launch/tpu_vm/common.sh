# What the scripts of this folder share: settings, gcloud, the answers of the workers. Runs in bash 3.2 (macOS) too.
# shellcheck shell=bash

set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
# shellcheck source=../arguments.sh
source "$root/launch/arguments.sh"
known='NAME|TYPE|ZONE|PROJECT|TIER|TRAIN|EMBED|RUNTIME|REPO|REV|CREATE_FLAGS|SSH_FLAGS|PRICE|POLL_SECONDS'

say() { printf '%s %s\n' "$(date '+%F %T')" "$*" >&2; }

# A mistake in the command or the settings: nothing has been done.
die() { printf 'error: %s\n' "$*" >&2; exit 2; }

# Something went wrong out there: says what it leaves behind.
fail() { printf 'error: %s\n' "$*" >&2; costs; exit 1; }

# Reads the options all scripts have, then the settings; what is left over is in the array `rest`.
begin() {
  settings=$here/settings.sh dry_run='' rest=()
  while (($#)); do
    case $1 in
      -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; exit 0 ;;
      --dry-run) dry_run=yes ;;
      --settings) (($# > 1)) || die "--settings needs a file"; settings=$2; shift ;;
      --settings=*) settings=${1#*=} ;;
      *) rest+=("$1") ;;
    esac
    shift
  done
  read_settings
  [[ -n $dry_run ]] || command -v gcloud >/dev/null ||
    die "gcloud not found: install the Google Cloud CLI (cloud.google.com/sdk), then run: gcloud auth login"
  exec 3>&1  # commands of --dry-run go here, also from within $(…), and nothing else
  [[ -z $dry_run ]] || exec 1>&2
  errors=$(mktemp)
  trap 'rm -f "$errors"' EXIT
}

no_more_arguments() { (($# == 0)) || die "unexpected argument \"$1\": see $(how "$(basename "$0" .sh)") --help"; }

read_settings() {
  local problem
  [[ -f $settings ]] ||
    die "no settings at $settings: cp launch/tpu_vm/settings.example.sh launch/tpu_vm/settings.sh, then edit it"
  problem=$(bash -n "$settings" 2>&1) || die "settings are not bash: ${problem%%$'\n'*}"
  problem=$(sed -n 's/^ *\([A-Za-z_][A-Za-z_0-9]*\)=.*/\1/p' "$settings" | grep -vxE "$known" || true)
  [[ -z $problem ]] || die "unknown setting ${problem%%$'\n'*} in $settings: there are ${known//|/, }"
  NAME='' TYPE='' ZONE='' PROJECT='' TIER=spot TRAIN=() EMBED=() RUNTIME='' REPO='' REV='' CREATE_FLAGS=() SSH_FLAGS=()
  PRICE='' POLL_SECONDS=30
  # shellcheck source=settings.example.sh
  source "$settings" || die "settings failed: $settings"
  [[ -n $NAME ]] || die "NAME is missing in $settings: a name for the TPU"
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,60}[a-z0-9])?$ ]] || die "NAME is \"$NAME\": lower-case letters, digits and -"
  [[ -n $TYPE ]] || die "TYPE is missing in $settings: a TPU type such as v6e-16"
  [[ $TYPE =~ ^v5e- ]] && die "TYPE is \"$TYPE\": gcloud calls it v5litepod-${TYPE#v5e-}"
  [[ $TYPE =~ ^v[0-9]+[a-z]*-[0-9]+$ ]] || die "TYPE is \"$TYPE\": give one such as v6e-16, v5litepod-8 or v5p-128"
  [[ -n $ZONE ]] || die "ZONE is missing in $settings: a zone that has $TYPE, such as us-east5-b"
  [[ $ZONE =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || die "ZONE is \"$ZONE\": give a zone such as us-east5-b"
  [[ $TIER =~ ^(spot|on-demand|reserved)$ ]] || die "TIER is \"$TIER\": spot, on-demand or reserved"
}

# How to call another script of this folder with these settings.
how() {
  printf 'launch/tpu_vm/%s.sh' "$1"
  [[ $settings == "$here/settings.sh" ]] || printf ' --settings %s' "$settings"
}

# Runs another script of this folder with these settings.
other() {
  local name=$1
  shift
  if [[ -n $dry_run ]]; then
    "$here/$name.sh" --settings "$settings" --dry-run "$@" >&3
  else
    "$here/$name.sh" --settings "$settings" "$@"
  fi
}

# gcloud compute tpus "$@" in the zone and project of the settings; what it complains about is in the file $errors.
cloud() {
  local -a command=(gcloud compute tpus "$@" "--zone=$ZONE")
  [[ -z $PROJECT ]] || command+=("--project=$PROJECT")
  show_or_run "${command[@]}" --quiet
}

show_or_run() {
  if [[ -n $dry_run ]]; then
    printf '%s\n' "$(quoted "$@")" >&3
  else
    "$@" 2>"$errors" </dev/null
  fi
}

# The same for a question. $1 is the answer that --dry-run goes on with.
ask() {
  local assumed=$1
  shift
  cloud "$@" || return
  [[ -z $dry_run ]] || printf '%s\n' "$assumed"
}

# WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, SUSPENDED, FAILED, …; MISSING, or UNKNOWN where gcloud fails.
request_state() { state_of "$1" queued-resources 'value(state.state)'; }

# CREATING, READY, PREEMPTED, REPAIRING, …; MISSING or UNKNOWN.
node_state() { state_of "$1" tpu-vm 'value(state)'; }

state_of() {
  local state
  if state=$(ask "$1" "$2" describe "$NAME" "--format=$3"); then
    printf '%s' "${state:-UNKNOWN}"
  elif grep -q NOT_FOUND "$errors" && ! grep -qiE '(location|zone) [^ ]+ (is |was )?not found' "$errors"; then
    printf MISSING
  else
    printf UNKNOWN
  fi
}

# What gcloud said last, in one line, and what to do about it.
reason() {
  local said
  said=$(grep -m 1 '^ERROR' "$errors" | sed 's/^ERROR: ([^)]*) //' || true)
  said=${said:-$(grep -vE '^(SSH: Attempting|Using ssh batch)' "$errors" | tail -n 1)}
  printf '%s' "${said:-gcloud says nothing}"
  remedy <"$errors"
}

remedy() {
  case $(cat) in
    *'no more capacity'* | *'not enough resources'*) printf ' → wait, or change ZONE, TYPE or TIER' ;;
    *RESOURCE_EXHAUSTED* | *[Qq]uota*)
      printf ' → quota refused: ask for more %s (%s) in %s at console.cloud.google.com/iam-admin/quotas, or %s' \
        "$TYPE" "$TIER" "$ZONE" 'change TYPE, ZONE or TIER' ;;
    *[Aa]ccelerator*) printf ' → is TYPE %s right? gcloud compute tpus accelerator-types list --zone %s' "$TYPE" "$ZONE" ;;
    *[Rr]untime*) printf ' → is RUNTIME right? gcloud compute tpus tpu-vm versions list --zone %s' "$ZONE" ;;
    *[Ll]ocation* | *[Zz]one*) printf ' → is ZONE %s right? gcloud compute tpus locations list' "$ZONE" ;;
    *'active account'* | *UNAUTHENTICATED* | *credentials*) printf ' → gcloud auth login' ;;
    *SERVICE_DISABLED* | *'has not been used'*) printf ' → gcloud services enable tpu.googleapis.com' ;;
    *PERMISSION_DENIED*) printf ' → is PROJECT right, and has your account the role TPU Admin in it?' ;;
  esac
}

# Says what exists and costs money, and how to delete it.
costs() {
  [[ -z $dry_run ]] || return 0
  local delete state
  delete=$(how delete)
  state=$(request_state '')
  case $state in
    MISSING) echo "note: no TPU $NAME exists in $ZONE, nothing runs that costs money" ;;
    FAILED | SUSPENDED) echo "note: nothing runs that costs money; the request $NAME is $state, remove it: $delete" ;;
    UNKNOWN) echo "note: gcloud did not tell whether TPU $NAME exists; if so it costs money, delete it: $delete" ;;
    WAITING_FOR_RESOURCES | ACCEPTED | CREATING)
      echo "note: the request $NAME waits in the queue and costs money once it is granted; take it back: $delete" ;;
    *) echo "note: TPU $NAME ($TYPE, $TIER, $ZONE) is $state and costs money until you delete it: $delete" ;;
  esac >&2
}

# The commit workers check out.
commit() {
  local rev=$REV
  [[ -n $rev ]] || rev=$(git -C "$root" rev-parse HEAD 2>/dev/null) || die "this checkout has no commit: set REV"
  printf '%s' "$rev"
}

# Deletes the slice and its request, and waits until both are gone.
delete_request() {
  local i
  cloud queued-resources delete "$NAME" --force >&2 || grep -q NOT_FOUND "$errors" || return
  for ((i = 0; i < 20; i++)); do
    [[ $(request_state MISSING) != MISSING ]] || return 0
    sleep "$POLL_SECONDS"
  done
  echo "ERROR: the request $NAME is still there" >"$errors"
  return 1
}

worker_count() { ask 1 tpu-vm describe "$NAME" '--format=value(networkEndpoints.len())'; }

# Runs worker.sh with the words after $2 on the workers $1 (all, or a number). Each answers "worker N: …"; one that was
# not set up answers "worker N: empty". $2 is the answer that --dry-run goes on with.
on_workers() {
  local who=$1 assumed=$2 file=if_jax/launch/tpu_vm/worker.sh
  shift 2
  # shellcheck disable=SC2016  # the worker expands it
  ask "$assumed" tpu-vm ssh "$NAME" "--worker=$who" \
    "--command=if test -f $file; then bash $file $(quoted "$@"); "'else echo "worker ${HOSTNAME##*-w-}: empty"; fi' \
    --ssh-flag=-oConnectTimeout=20 --ssh-flag=-oServerAliveInterval=20 ${SSH_FLAGS[@]+"${SSH_FLAGS[@]}"}
}

# Those of $count workers without a line "worker N: $1…" in $2, as "0 3".
without() {
  local i list=''
  for ((i = 0; i < count; i++)); do
    grep -qE "^worker $i: $1" <<<"$2" || list+=" $i"
  done
  printf '%s' "${list# }"
}

# What workers complained about, with "; " between them.
complaints() { sed -n 's/^\(worker [0-9]*: error: .*\)/\1/p' <<<"$1" | paste -sd ';' - | sed 's/;/; /g'; }

# What workers complained about in $1, else what gcloud did.
why() {
  local said
  said=$(complaints "$1")
  printf '%s' "${said:-$(reason)}"
}

# All the scripts that talk to workers need a slice that is READY.
need_ready() {
  local state
  state=$(node_state READY)
  case $state in
    READY) ;;
    MISSING) die "there is no TPU $NAME in $ZONE: $(how create)" ;;
    UNKNOWN) die "$(reason)" ;;
    *) die "TPU $NAME is $state, not READY: $(how status)" ;;
  esac
  count=$(worker_count) || die "$(reason)"
}
