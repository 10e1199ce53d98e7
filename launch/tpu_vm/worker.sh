#!/usr/bin/env bash
# Runs on a worker of a TPU slice, called by the other scripts of this folder through ssh. Every answer is one line,
# "worker N: …".
#
#   install          make ~/if_jax-venv and install this checkout with the tpu extra
#   check            may a run start here? "ready at COMMIT", "running …" or "error: …"
#   data WORDS       reads a sample of the recipe's data from its bucket: a line "data …" for each thing it has seen
#   start WORDS      if-jax train WORDS (or if-jax embed …, where that is the first of them), detached; its log is
#                    ~/if_jax-run/log, each start adds to it
#   status           idle | running … | ended CODE: … | stopped CODE: … | lost: …
#   stop SECONDS     SIGTERM, which saves and ends the run; waits that long
#   end SECONDS      the same, then SIGKILL
#   log LINES        the last lines of the log
#   follow           the log as it grows
set -uo pipefail

home=~/if_jax-run
venv=~/if_jax-venv
worker="worker ${HOSTNAME##*-w-}"
cd ~/if_jax || exit 1
mkdir -p "$home"

say() { printf '%s: %s\n' "$worker" "$*"; }

# Runs a step of the installation quietly; where it fails, its last line is the answer.
step() {
  "$@" >"$home/install.log" 2>&1 && return
  say "error: $1 failed: $(tail -n 1 "$home/install.log")"
  exit 1
}

install() {
  # Ubuntu 22.04, the usual image, comes with Python 3.10; its own updates hold the lock of apt after a start.
  if ! command -v python3.11 >/dev/null; then
    step sudo apt-get -qq -o DPkg::Lock::Timeout=600 update
    step sudo apt-get -qq -o DPkg::Lock::Timeout=600 install -y python3.11 python3.11-venv
  fi
  [[ -x $venv/bin/pip ]] || step python3.11 -m venv "$venv"
  step "$venv/bin/pip" install -q -e '.[tpu]'
  say "ready at $(git rev-parse HEAD)"
}

check() {
  if running; then
    say "running, process $pid"
  elif [[ ! -x $venv/bin/if-jax ]]; then
    say "error: not installed"
  else
    say "ready at $(git rev-parse HEAD)"
  fi
}

# The doctor's "pass data speed: …" becomes "worker N: data speed: …", and what fails an error.
data() {
  local line last='it says nothing' seen=''
  while read -r line || [[ -n $line ]]; do
    case $line in
      'pass data'*) say "${line#pass }"; seen=yes ;;
      'warn data'*) say "${line#warn } (warning)"; seen=yes ;;
      'fail '*) say "error: ${line#fail }"; seen=yes ;;
      ?*) last=$line ;;
    esac
  done < <("$venv/bin/if-jax" doctor --data-only "$@" 2>&1)
  [[ -n $seen ]] || say "error: if-jax doctor: $last"
}

# The process of the run, in pid, where there is one.
running() {
  pid=$(cat "$home/pid" 2>/dev/null) && [[ -n $pid ]] && tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -q if-jax
}

start() {
  local i
  [[ ${1:-} == embed ]] || set -- train "$@"
  running && { say "error: a run is going on, process $pid"; exit 1; }
  rm -f "$home"/{pid,code,stopped}
  printf '== %s: %s: if-jax %s\n' "$(date '+%F %T')" "$(git rev-parse --short HEAD)" "$*" >>"$home/log"
  # shellcheck disable=SC2016  # the inner shell expands it: it outlives this one and notes how the run has ended
  nohup bash -c 'home=$1; shift; "$@" & echo $! >"$home/pid"; wait $!; echo $? >"$home/code.part"
    mv "$home/code.part" "$home/code"' run "$home" "$venv/bin/if-jax" "$@" >>"$home/log" 2>&1 </dev/null &
  for ((i = 0; i < 50; i++)); do
    [[ -s $home/pid ]] && { say "started, process $(cat "$home/pid")"; return; }
    sleep 0.1
  done
  say "error: the run did not start"
  exit 1
}

# The last line of the log; a progress bar rewrites its line.
last_line() { tail -c 2000 "$home/log" 2>/dev/null | tr '\r' '\n' | grep -v '^[[:space:]]*$' | tail -n 1; }

status() {
  if running; then
    say "running: $(last_line)"
  elif [[ -f $home/code ]]; then
    say "$([[ -f $home/stopped ]] && echo stopped || echo ended) $(cat "$home/code"): $(last_line)"
  elif [[ -f $home/pid ]]; then
    say "lost: the process is gone without an exit code (was the machine started again?)"
  else
    say "idle"
  fi
}

stop() {
  local i
  running || { say "no run"; return; }
  kill -TERM "$pid"
  for ((i = 0; i < $1 * 5; i++)); do
    running || { say "stopped"; return; }
    sleep 0.2
  done
  say "still running after $1 s"
}

end() {
  stop "$1"
  running && kill -KILL "$pid"
  return 0
}

case ${1:-} in
  install | check | status) "$1" ;;
  data) shift; data "$@" ;;
  start) shift; start "$@" ;;
  stop) running && touch "$home/stopped"; stop "$2" ;;
  end) end "$2" ;;
  log) tail -n "$2" "$home/log" 2>/dev/null | tr '\r' '\n' | sed "s/^/$worker: /" ;;
  follow) tail -n 20 -F "$home/log" 2>/dev/null ;;
  *) say "error: unknown word \"${1:-}\""; exit 1 ;;
esac
