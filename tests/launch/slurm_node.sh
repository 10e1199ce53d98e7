#!/usr/bin/env bash
# A Slurm of one node, this machine, out of Debian's packages and a folder of its own: nothing outside is touched, so
# it runs beside another Slurm, without systemd, cgroups or a database, as root or as whoever calls.
#
# usage: tests/launch/slurm_node.sh start FOLDER     then: export SLURM_CONF=FOLDER/slurm.conf; sinfo
#        tests/launch/slurm_node.sh stop FOLDER
#
# needs: apt-get install --no-install-recommends slurm-wlm munge
set -euo pipefail

DAEMONS=(munged slurmctld slurmd) # in the order they start

die() { printf 'error: %s\n' "$*" >&2; exit 2; }

main() {
  [[ $# == 2 && $1 =~ ^(start|stop)$ ]] || die "usage: $0 start|stop FOLDER"
  PATH=$PATH:/usr/sbin:/sbin
  mkdir -p "$2"
  folder=$(cd "$2" && pwd)
  "$1"
}

start() {
  local daemon
  for daemon in "${DAEMONS[@]}" sbatch; do
    command -v "$daemon" >/dev/null || die "$daemon not found: apt-get install --no-install-recommends slurm-wlm munge"
  done
  getent hosts "$(hostname -s)" >/dev/null || die "$(hostname -s), the name of this machine, leads nowhere: /etc/hosts"
  export SLURM_CONF=$folder/slurm.conf
  configure
  trap 'stop' ERR
  # --force: the folder may be one that only its owner can look into.
  munged --force --key-file "$folder/munge.key" --socket "$folder/munge.socket" --pid-file "$folder/munged.pid" \
    --log-file "$folder/munged.log" --seed-file "$folder/munged.seed" 2>"$folder/munged.err"
  slurmctld -c
  slurmd
  wait_for_node
}

configure() {
  mkdir -p "$folder/state" "$folder/spool"
  (umask 077 && head -c 128 /dev/urandom >"$folder/munge.key")
  local ports
  ports=$(free_ports)
  # cred_expire is how long a requeued job waits before it starts again.
  cat >"$SLURM_CONF" <<CONF
ClusterName=one
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=${ports% *}
SlurmdPort=${ports#* }
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=sched_interval=2
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=$(hostname -s) Default=YES MaxTime=INFINITE State=UP
CONF
}

free_ports() {
  local port found=()
  for ((port = 20000 + RANDOM % 20000; ${#found[@]} < 2; port++)); do
    (: >"/dev/tcp/127.0.0.1/$port") 2>/dev/null || found+=("$port")
  done
  echo "${found[@]}"
}

wait_for_node() {
  local _
  for _ in {1..60}; do
    [[ $(sinfo --noheader --format %T 2>/dev/null) == idle ]] && return
    sleep 0.5
  done
  stop
  die "the node did not come up in 30 s: see $folder/*.log"
}

stop() {
  local i pid
  for ((i = ${#DAEMONS[@]} - 1; i >= 0; i--)); do
    pid=$(cat "$folder/${DAEMONS[i]}.pid" 2>/dev/null) || continue
    kill "$pid" 2>/dev/null || continue
    for _ in {1..50}; do
      kill -0 "$pid" 2>/dev/null || continue 2
      sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null || true
  done
}

main "$@"
