#!/usr/bin/env bash
# Makes the fast form of a demo cascade: a student of its stage I that draws in four calls, beside its other stages.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/demo_fast.sh WORKDIR [--teacher CASCADE] [--form NAME] [--steps N] [--prompts N]

Trains a student of stage I of CASCADE by configs/distill_demo.py, joins it with the later stages of CASCADE into
WORKDIR/cascades/demo-fast, and scores it. The same command goes on after any interruption.

  --teacher CASCADE  a release folder [default: the demo in the package]
  --form NAME        form of the recipe [default: the recipe as it stands]
  --steps N          updates, in place of the recipe's, to see that everything runs
  --prompts N        prompts of the score [default: 84]

example:
  nice -n 19 launch/demo_fast.sh runs/demo_fast --teacher runs/demo/cascades/demo
TEXT
}

die() { printf 'error: %s\n' "$*" >&2; exit 2; }

main() {
  case ${1:-} in
    -h | --help) usage; exit 0 ;;
    '' | -*) usage >&2; exit 2 ;;
  esac
  mkdir -p "$1"
  local work teacher='' form='' steps='' prompts=84
  work=$(cd "$1" && pwd)
  shift
  while (($#)); do
    case $1 in
      --teacher) [[ -f ${2:-}/cascade.json ]] || die "--teacher is \"${2:-}\": give a cascade folder"
        teacher=$(cd "$2" && pwd) ;;
      --form) form=${2:-}; [[ -n $form ]] || die '--form is "": give a form of configs/distill_demo.py' ;;
      --steps) steps=${2:-} ;;
      --prompts) prompts=${2:-} ;;
      *) die "$1 is unknown: see launch/demo_fast.sh --help" ;;
    esac
    [[ $1 != --steps && $1 != --prompts || ${2:-} =~ ^[1-9][0-9]*$ ]] \
      || die "$1 is \"${2:-}\": give a number, 1 or more"
    shift 2
  done
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  : "${teacher:=if_jax/demo}"
  local python=${PYTHON:-python} fast=$work/cascades/demo-fast report=$work/scores/demo-fast.json
  command -v "$python" >/dev/null \
    || die "$python not found: activate the environment if_jax is installed in, or set PYTHON"
  shopt -s nullglob
  local later=("$teacher"/stage_I?*)

  if [[ ! -d $fast ]]; then
    "$python" -m if_jax train --config "configs/distill_demo.py${form:+:$form}" --workdir "$work/runs/fast_I" \
      --config.distill.teacher="$teacher/stage_I" --config.text_encoder_from="$teacher/stage_I" \
      ${steps:+--config.steps="$steps" --config.log_every=1 --config.checkpoint_every=1 --config.sample.every=0}
    "$python" -m if_jax export "$work/runs/fast_I" "${later[@]}" "$fast" --dtype float16
  fi
  mkdir -p "$work/scores"
  [[ -f $report ]] || "$python" -m if_jax evaluate --cascade "$fast" --suite synth --prompts "$prompts" \
    --out "$work/scores/demo-fast" --json "$report"
  "$python" - "$report" <<'PYTHON'
import json, sys
report = json.load(open(sys.argv[1]))
tasks = ("single", "colour", "two", "count", "position", "binding")
print(f"demo-fast: SynthEval {report['overall']} {report['overall_ci']};", ", ".join(f"{t} {report[t]}" for t in tasks))
PYTHON
}

main "$@"
