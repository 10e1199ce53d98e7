#!/usr/bin/env bash
# Makes the demo cascade from nothing: text encoder, stage I at 32 and at 64 px, stages II and III on crops.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/demo.sh WORKDIR [--steps N] [--prompts N]

Teaches the text encoder, trains the legs one after another on whatever device JAX finds, joins them into
WORKDIR/cascades/demo, and scores it. The same command goes on after any interruption: legs that are done are not run
again, and the one that was interrupted resumes from its newest checkpoint. Each leg ends with its score in one line.

  --steps N     updates of every leg, in place of its recipe's, to see that everything runs
  --prompts N   prompts of the score after a leg of stage I, and at the end [default: 84]

example:
  nice -n 19 launch/demo.sh runs/demo
TEXT
}

die() { printf 'error: %s\n' "$*" >&2; exit 2; }

main() {
  case ${1:-} in
    -h | --help) usage; exit 0 ;;
    '' | -*) usage >&2; exit 2 ;;
  esac
  mkdir -p "$1"
  work=$(cd "$1" && pwd) steps='' prompts=84
  shift
  while (($#)); do
    case $1 in
      --steps) steps=${2:-} ;;
      --prompts) prompts=${2:-} ;;
      *) die "$1 is unknown: see launch/demo.sh --help" ;;
    esac
    [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || die "$1 is \"${2:-}\": give a number, 1 or more"
    shift 2
  done
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  python=${PYTHON:-python}
  command -v "$python" >/dev/null \
    || die "$python not found: activate the environment if_jax is installed in, or set PYTHON"

  [[ -d $work/encoder ]] || "$python" -m if_jax.training.teach_text "$work/encoder" ${steps:+--steps "$steps" --scenes 64}
  leg small demo_base.py
  leg large demo_base.py --config.init_from="$work/cascades/small/stage_I"
  leg crops demo_sr.py
  leg more demo_sr.py --config.init_from="$work/cascades/crops"
  leg fine demo_sr_1024.py
  [[ -d $work/cascades/demo ]] \
    || "$python" -m if_jax export "$work"/runs/{large,more,fine} "$work/cascades/demo" --dtype float16 --guidance 2
  score demo
}

# NAME RECIPE KEYS…: trains a leg, releases it and, if it draws from text alone, scores it.
leg() {
  local name=$1 recipe=$2
  shift 2
  if [[ ! -d $work/cascades/$name ]]; then
    "$python" -m if_jax train --config "configs/$recipe:$name" --workdir "$work/runs/$name" \
      --config.text_encoder_from="$work/encoder" "$@" \
      ${steps:+--config.steps="$steps" --config.log_every=1 --config.checkpoint_every=1 --config.sample.every=0}
    "$python" -m if_jax export "$work/runs/$name" "$work/cascades/$name"
  fi
  [[ $recipe != demo_base.py ]] || score "$name"
}

score() {
  local name=$1 report=$work/scores/$1.json
  mkdir -p "$work/scores"
  [[ -f $report ]] || "$python" -m if_jax evaluate --cascade "$work/cascades/$name" --suite synth \
    --prompts "$prompts" --guidance 2 --out "$work/scores/$name" --json "$report"
  "$python" - "$name" "$report" <<'PYTHON'
import json, sys
name, report = sys.argv[1], json.load(open(sys.argv[2]))
tasks = ("single", "colour", "two", "count", "position", "binding")
print(f"leg {name}: SynthEval {report['overall']} {report['overall_ci']};", ", ".join(f"{t} {report[t]}" for t in tasks))
PYTHON
}

main "$@"
