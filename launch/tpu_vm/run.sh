#!/usr/bin/env bash
# Start `if-jax train` with the TRAIN arguments of the settings on all workers, detached.
#
# usage: launch/tpu_vm/run.sh [--embed] [--settings FILE] [--dry-run]
#
# With --embed it starts `if-jax embed` with the EMBED arguments instead, which divides its work over the workers.
# A lost connection does not end the run. Each worker keeps its log in ~/if_jax-run/log. The same call resumes a run that
# has ended: from the newest checkpoint in --workdir. Starts on all workers or on none.

# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

main() {
  begin "$@"
  local -a words=()
  if [[ ${rest[0]:-} == --embed ]]; then
    rest=(${rest[@]+"${rest[@]:1}"})
    no_more_arguments ${rest[@]+"${rest[@]}"}
    check_words EMBED --out ${EMBED[@]+"${EMBED[@]}"}
    words=(embed "${EMBED[@]}")
  else
    no_more_arguments ${rest[@]+"${rest[@]}"}
    check_words TRAIN --workdir ${TRAIN[@]+"${TRAIN[@]}"}
    words=("${TRAIN[@]}")
  fi
  need_ready
  check_workers
  local answer bad
  answer=$(on_workers all 'worker 0: started, process 1' start "${words[@]}") || true
  bad=$(without 'started, ' "$answer")
  if [[ -n $bad ]]; then
    on_workers all '' end 20 >/dev/null || true
    fail "worker(s) $bad of $count did not start, the others were ended: $(why "$answer")"
  fi
  say "the run goes on $count worker(s): $(how status), $(how logs), $(how watch)"
  costs
}

# Many hosts need a recipe they all have and a folder they all see. $1 is the setting, $2 the option that names the folder.
check_words() {
  local setting=$1 option=$2 config folder
  shift 2
  config=$(value_of --config "$@")
  folder=$(value_of "$option" "$@")
  [[ -n $config ]] || die "--config is missing in $setting of $settings: which recipe?"
  [[ -f $root/${config%%:*} ]] || die "$setting has --config $config: not in this checkout, so not on the workers"
  [[ $folder == gs://* ]] || die "$setting has $option \"$folder\": all workers must see it, give a gs:// path"
  [[ $folder != gs://BUCKET/* ]] || die "$setting has $option $folder: put the name of your bucket there"
}

check_workers() {
  local answer bad
  answer=$(on_workers all 'worker 0: ready at 0' check) || true
  bad=$(without '' "$answer")
  [[ -z $bad ]] || fail "worker(s) $bad of $count do not answer, nothing was started: $(why "$answer")"
  bad=$(sed -n 's/^worker \([0-9]*\): running.*/\1/p' <<<"$answer" | sort -n | paste -sd ' ' -)
  [[ -z $bad ]] || die "a run is going on on worker(s) $bad: $(how stop), or $(how status)"
  bad=$(without 'ready at ' "$answer")
  [[ -z $bad ]] || fail "worker(s) $bad of $count are not set up, nothing was started: $(how setup)"
  bad=$(sed -n 's/^worker [0-9]*: ready at //p' <<<"$answer" | sort -u | paste -sd ' ' -)
  [[ $bad != *' '* ]] || fail "the workers have different commits ($bad), nothing was started: $(how setup)"
}

main "$@"
