#!/usr/bin/env bash
# What a launcher does on one host of a run. The launchers call it; a person rarely does.
#
#   bash scripts/worker.sh run PROGRAM ARGUMENT...    run a program; end as described below
#   bash scripts/worker.sh start PROGRAM ARGUMENT...  the same in the background; the log is run.log
#   bash scripts/worker.sh follow [LINES]             print the log until the run ends, then end as the run did
#   bash scripts/worker.sh state                      print one line: none, running, or ended STATUS
#   bash scripts/worker.sh stop                       send SIGTERM, and wait until the run has saved and ended
#   bash scripts/worker.sh idle                       fail if a run is in progress
#   bash scripts/worker.sh install EXTRAS             make .venv with the package: install '[tpu]'
#
# dpp-jax ends with 0 both when everything is done and when SIGTERM made it save and stop. A launcher must run
# it again in one case and not in the other. dpp-jax tells them apart by its last words, and this script by its
# exit status:
#   0      everything that was asked for is done
#   75     the run stopped, or lost one of its processes: run the same command again
#   other  as the program ended: an error to mend, or a signal (128 + its number)
set -euo pipefail

AGAIN=75  # EX_TEMPFAIL of sysexits.h
AGAIN_WORDS='Run the same command'  # dpp-jax says so whenever the same command goes on
LAST_LINES=50  # of the output, in which it says so
END_SECONDS=180  # a process that lost the others ends within two minutes

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
pid_file=$root/run.pid log_file=$root/run.log status_file=$root/run.status

say() { echo "worker $(hostname): $*" >&2; }

# Run a program in the foreground and pass SIGTERM on to it.
run() {
  local folder reader child='' asked='' status
  folder=$(mktemp -d) || return 1
  trap 'asked=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' TERM INT
  mkfifo "$folder/output"
  # Whoever signals the whole group must not take the program's listener away.
  (trap '' TERM INT HUP; exec tee "$folder/log" <"$folder/output") &
  reader=$!
  "$@" >"$folder/output" 2>&1 &
  child=$!
  [ -z "$asked" ] || kill -TERM "$child" 2>/dev/null || true
  while :; do  # a signal ends `wait` before the program has ended
    asked='' status=0
    wait "$child" || status=$?
    [ -n "$asked" ] || break
  done
  wait "$reader" || true
  if [ "$status" -le 128 ] && tail -n "$LAST_LINES" "$folder/log" | grep -q "$AGAIN_WORDS"; then
    status=$AGAIN
  fi
  rm -rf "$folder"
  return "$status"
}

# Whether the run that wrote the pid is in progress. A number may belong to another program after a reboot.
is_running() {
  local pid
  pid=$(cat "$pid_file" 2>/dev/null) || return 1
  tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -Eq 'worker\.sh (start|logged)'
}

# Wait until no run is in progress; fail after END_SECONDS.
wait_for_end() {
  local until=$((SECONDS + END_SECONDS))
  while is_running; do
    [ "$SECONDS" -lt "$until" ] || return 1
    sleep 0.2
  done
}

start() {
  if is_running; then
    say "waits up to $END_SECONDS s for the run before this one to end"
    wait_for_end || { say 'a run is in progress; stop it first'; exit 1; }
  fi
  umask 077  # the log tells losses and scores: as private/
  [ ! -e "$log_file" ] || mv "$log_file" "$root/run.previous.log"
  rm -f "$status_file"
  # A session of its own: the run outlives the connection.
  setsid bash "$root/scripts/worker.sh" logged "$@" >"$log_file" 2>&1 </dev/null &
  echo $! >"$pid_file"
  say "started; the log is $log_file"
}

# In the background: keep the status for `state`.
logged() {
  local status=0
  run "$@" || status=$?
  echo "$status" >"$status_file.new"
  mv "$status_file.new" "$status_file"
}

state() {
  if is_running; then
    echo running
  elif [ -e "$status_file" ]; then
    echo "ended $(cat "$status_file")"
  elif [ -e "$pid_file" ]; then
    echo 'ended 137'  # killed together with its wrapper, or by a reboot
  else
    echo none
  fi
}

follow() {
  local state
  [ -e "$log_file" ] || { say 'there is no run to follow'; exit 1; }
  if is_running; then
    tail -n "${1:-+1}" --sleep-interval=0.2 --pid="$(cat "$pid_file")" -f "$log_file"
  else
    tail -n "${1:-+1}" "$log_file"
  fi
  state=$(state)
  say "the run: $state"
  [ "$state" = 'ended 0' ] || exit "${state#ended }"
}

stop() {
  if is_running; then
    kill -TERM "$(cat "$pid_file")"
    wait_for_end || { say "the run did not end within $END_SECONDS s"; exit 1; }
  fi
  say "the run: $(state)"
}

install() {
  local python found=''
  for python in python3.13 python3.12 python3.11 python3; do
    if "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      found=$python
      break
    fi
  done
  if [ -z "$found" ]; then  # as in the images of TPU hosts, which are older
    say 'installs Python 3.12, because this host has none from 3.11 on'
    python3 -m pip install --quiet --user uv
    python3 -m uv python install --quiet 3.12
    found=$(python3 -m uv python find 3.12)
  fi
  cd "$root"
  . scripts/environment.sh
  PYTHON=$found use_environment .venv "$1"
}

action=${1:-}
[ $# -eq 0 ] || shift
case $action in
  run | start | logged | follow | state | stop | install)
    cd "$root"
    "$action" "$@"
    ;;
  idle)
    ! is_running || { say 'a run is in progress; stop it first'; exit 1; }
    ;;
  *)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0" >&2
    exit 2
    ;;
esac
