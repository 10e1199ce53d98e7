#!/usr/bin/env bash
# Train on GKE: a JobSet on TPU nodes, made by xpk (pip install xpk; needs gcloud, kubectl and docker).
#
# usage: launch/gke.sh run    --cluster C --workload W --type TYPE [options] -- TRAIN_ARGUMENTS
#        launch/gke.sh status --cluster C [--workload W] [options]
#        launch/gke.sh logs   --workload W
#        launch/gke.sh delete --cluster C --workload W [options]
#
#   run      one job on every host of the slice; GKE starts all of them again, up to --restarts times (100), when a
#            process is lost, stuck or preempted (exit codes 75 to 78, 143, signals), not after a mistake (1, 2)
#   status   the workloads of the cluster
#   logs     follows the log of worker 0
#   delete   ends the run, which saves first (up to five minutes), and removes the workload
#
# options:
#   --zone Z, --project P   of the cluster              (gcloud's configuration)
#   --image IMAGE           one that has if_jax in it; without it xpk builds one from this checkout, and every host
#                           installs the tpu extra when it starts
#   --restarts N, --dry-run
#
# The cluster is yours to make and to delete; its nodes cost money whether a workload runs or not:
#   xpk cluster create --cluster C --tpu-type TYPE --num-slices 1 --spot --zone Z
#   xpk cluster delete --cluster C --zone Z
#
# example:
#   launch/gke.sh run --cluster c --workload base --type v6e-16 --zone us-east5-b -- \
#     --config configs/demo_base.py --workdir gs://bucket/runs/base
set -euo pipefail

# shellcheck source=arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"

die() { printf 'error: %s\n' "$*" >&2; exit 2; }

main() {
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  cluster='' workload='' type='' zone='' project='' image='' restarts=100 dry_run=''
  local action=${1:-}
  case $action in
    -h | --help) help; exit 0 ;;
    run | status | logs | delete) shift ;;
    '') help >&2; exit 2 ;;
    *) die "unknown command \"$action\": run, status, logs or delete" ;;
  esac
  while (($#)); do
    case $1 in
      -h | --help) help; exit 0 ;;
      --dry-run) dry_run=yes; shift ;;
      --cluster | --workload | --type | --zone | --project | --image | --restarts)
        (($# > 1)) && [[ $2 != -* ]] || die "$1 needs a value"
        printf -v "${1#--}" '%s' "$2"
        shift 2
        ;;
      --) break ;;
      *) die "unknown option $1: see launch/gke.sh --help" ;;
    esac
  done
  [[ $action == run || $# -eq 0 ]] || die "unexpected argument \"${2:-$1}\" after $action"
  where=(--cluster "$cluster")
  [[ -z $zone ]] || where+=(--zone "$zone")
  [[ -z $project ]] || where+=(--project "$project")
  [[ $action == logs || -n $cluster ]] || die "--cluster is missing"
  [[ $action == status || -n $workload ]] || die "--workload is missing: a name for the run"
  "$action" "$@"
}

help() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "${BASH_SOURCE[0]}"; }

run() {
  [[ -n $type ]] || die "--type is missing: a TPU type such as v6e-16"
  [[ $restarts =~ ^[0-9]+$ ]] || die "--restarts is \"$restarts\": give a number"
  [[ ${1:-} == -- ]] || die "\"--\" is missing before the train arguments"
  shift
  check_train "$@"
  local train
  train=$(quoted if-jax train "$@")
  # "exec": SIGTERM, which xpk passes on to its child, has to reach if-jax. One line: xpk puts it into YAML.
  [[ $train != *$'\n'* ]] || die "a train argument has a line break"
  local -a source=(--docker-image "$image") command
  if [[ -z $image ]]; then
    source=(--base-docker-image python:3.12-slim --script-dir "$root")
    train="pip install -q --root-user-action=ignore -e '.[tpu]' && exec $train"
  else
    train="exec $train"
  fi
  command=(xpk workload create --workload "$workload" "${where[@]}" --tpu-type "$type"
    "${source[@]}" --command "$train" --max-restarts "$restarts" --restart-on-exit-codes "75,76,77,78"
    --termination-grace-period-seconds 300)
  call "${command[@]}" || die "xpk refused the workload, see above; what runs: $(again status)"
  echo "note: the nodes of cluster $cluster cost money until you delete the cluster or shrink it; end the run:" \
    "$(again delete)" >&2
}

status() {
  local -a job=()
  [[ -z $workload ]] || job=(--filter-by-job "$workload")
  call xpk workload list "${where[@]}" ${job[@]+"${job[@]}"}
}

logs() {
  call kubectl logs --follow --tail 50 --selector \
    "jobset.sigs.k8s.io/jobset-name=$workload,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
}

delete() {
  call xpk workload delete --workload "$workload" "${where[@]}" --force
  echo "note: the nodes of cluster $cluster go on costing money: xpk cluster delete $(quoted "${where[@]}")" >&2
}

# A run on many hosts needs a recipe they all have and a folder they all see.
check_train() {
  local config workdir
  config=$(value_of --config "$@")
  workdir=$(value_of --workdir "$@")
  [[ -n $config ]] || die "--config is missing: which recipe?"
  [[ -f $root/${config%%:*} ]] || die "--config $config does not exist in this checkout, so not in the image"
  [[ $workdir == gs://* ]] || die "--workdir is \"$workdir\": all hosts must see it, give a gs:// path"
}

call() {
  if [[ -n $dry_run ]]; then
    quoted "$@"
    echo
    return
  fi
  command -v "$1" >/dev/null || die "$1 not found: $([[ $1 == xpk ]] && echo 'pip install xpk' ||
    echo 'gcloud components install kubectl')"
  "$@"
}

again() { printf 'launch/gke.sh %s --workload %s %s' "$1" "$workload" "$(quoted "${where[@]}")"; }

main "$@"
