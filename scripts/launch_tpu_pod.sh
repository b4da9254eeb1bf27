#!/usr/bin/env bash
# Run dpp-jax on all hosts of a Cloud TPU, from your own machine. Needs gcloud, logged in; bash 3.2 or newer.
#
#   bash scripts/launch_tpu_pod.sh COMMAND OPTION... [-- ARGUMENT OF dpp-jax...]
#
#   bash scripts/launch_tpu_pod.sh all --name=mine --zone=us-central2-b --type=v4-32 --hosts=4 --spot \
#     --runtime=tpu-ubuntu2204-base -- --config=mnist_28:1 --workdir=gs://bucket/mnist
#
# Commands, in the order in which `all` runs them:
#   queue    ask for the TPU; it comes when there is one (`create` makes it at once, or fails; then `all`)
#   wait     wait until the TPU is there
#   copy     copy the code of this checkout to all hosts
#   install  unpack it there, and install it with what it needs
#   run      start dpp-jax on all hosts, with --distributed=auto --hosts=N and your arguments
#   follow   print the log of host 0 until the run ends; Ctrl-C leaves the run alone
# `all` does what is not done yet. If the TPU was preempted it asks for another one, and the run goes on.
# `resume` is the same. Other commands:
#   status   say what there is, and whether a run is in progress
#   stop     let the run save and end, on all hosts
#   delete   delete the TPU. NOTHING ELSE DOES, without --delete-when-done: until then it costs money
#
# Options:
#   --name=NAME --zone=ZONE [--project=PROJECT]
#   --type=TYPE          accelerator type, as v4-32           (create, queue, all, resume)
#   --runtime=VERSION    software of the hosts, as tpu-ubuntu2204-base          (the same)
#   --hosts=N            hosts of this type; dpp-jax compares      (run, all, resume)
#   --spot               cheaper; may be preempted at any time
#   --create-flag=FLAG   one more flag of gcloud's create, as --create-flag=--network=mine; any number
#   --port=PORT          of the coordinator, host 0, which the other hosts must reach; JAX's is 8482
#   --restarts=N         how often `all` goes on by itself; 50
#   --poll=SECONDS       between two looks at a TPU that is to come; 30
#   --delete-when-done   let `all` delete the TPU when everything is done
#   --yes                let `delete` not ask
#   --dry-run            print every command, and run none
#
# The disks of a TPU go with it: --workdir, and --private where given, belong in a bucket. The service account
# of the TPU must be allowed to read and write it.
set -euo pipefail

AGAIN=75  # as worker.sh ends when the same command goes on
CODE='dpp_jax configs scripts setup.py pyproject.toml constraints.txt README.md LICENSE'
LOST_CONNECTIONS=10  # in a row, before `follow` gives up
REMOTE=dpp_jax/scripts/worker.sh

root=$(cd "$(dirname "$0")/.." && pwd)
name='' zone='' project='' type='' runtime='' hosts='' port='' dry_run='' spot='' yes='' delete_when_done=''
restarts=50 poll=30 step='' is_new='' has_tpu=''
arguments=() create_flags=() problems=() at=()

say() { echo "launch_tpu_pod: $*" >&2; }

# Print words as a shell would have them typed.
quoted() {
  local word line='' quote="'" escaped="'\\''"
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) word="'${word//$quote/$escaped}'" ;;
    esac
    line="$line $word"
  done
  printf '%s\n' "${line# }"
}

# Print a command, and run it unless this is a dry run.
do_it() {
  if [ -n "$dry_run" ]; then
    quoted "$@"
  else
    echo "+ $(quoted "$@")" >&2
    "$@"
  fi
}

# ── What is asked for ───────────────────────────────────────────────────────────────────────────────────────

parse() {
  while [ $# -gt 0 ]; do
    case $1 in
      --name=*) name=${1#*=} ;;
      --zone=*) zone=${1#*=} ;;
      --project=*) project=${1#*=} ;;
      --type=*) type=${1#*=} ;;
      --runtime=*) runtime=${1#*=} ;;
      --hosts=*) hosts=${1#*=} ;;
      --port=*) port=${1#*=} ;;
      --restarts=*) restarts=${1#*=} ;;
      --poll=*) poll=${1#*=} ;;
      --create-flag=*) create_flags+=("${1#*=}") ;;
      --spot) spot=1 ;;
      --yes) yes=1 ;;
      --delete-when-done) delete_when_done=1 ;;
      --dry-run) dry_run=1 ;;
      --)
        shift
        arguments=("$@")
        break
        ;;
      *) problems+=("$1 is not an option; options are written --name=value, dpp-jax's own after --") ;;
    esac
    shift
  done
}

# Find everything that is missing or wrong, before anything is made.
check() {
  local problem
  case $command in
    all | resume | create | queue | wait | copy | install | run | follow | status | stop | delete) ;;
    *) problems+=("the command is '$command'; it must be all, resume, create, queue, wait, copy, install," \
      "run, follow, status, stop or delete, and come first") ;;
  esac
  need "$name" --name 'the name of the TPU, as --name=mine'
  need "$zone" --zone 'where the TPU is, as --zone=us-central2-b'
  case $command in
    all | resume | create | queue)
      need "$type" --type 'the accelerator type, as --type=v4-32'
      need "$runtime" --runtime 'the software of the hosts, as --runtime=tpu-ubuntu2204-base'
      ;;
  esac
  case $command in all | resume | run) check_run ;; esac
  check_number "$restarts" --restarts
  check_number "$poll" --poll
  [ -z "$port" ] || check_number "$port" --port
  [ -n "$dry_run" ] || command -v gcloud >/dev/null \
    || problems+=('gcloud is not on PATH; install the Google Cloud CLI and log in')
  [ "${#problems[@]}" -gt 0 ] || return 0
  for problem in "${problems[@]}"; do say "$problem"; done
  say 'nothing was done. The head of this script lists commands and options'
  exit 2
}

need() { [ -n "$1" ] || problems+=("$2 is missing; it must be $3"); }

check_number() {
  case $1 in '' | *[!0-9]*) problems+=("$2 is '$1'; it must be a whole number") ;; esac
}

check_run() {
  local argument config='' workdir='' private=''
  case $hosts in
    '' | 0 | *[!0-9]*) problems+=("--hosts is '$hosts'; it must be the number of hosts of this type, as 4 for v4-32") ;;
  esac
  for argument in ${arguments[@]+"${arguments[@]}"}; do
    case $argument in
      --config=*) config=${argument#*=} ;;
      --workdir=*) workdir=${argument#*=} ;;
      --private=*) private=${argument#*=} ;;
    esac
  done
  need "$config" '-- --config' 'a config of dpp-jax and ε, as -- --config=mnist_28:1'
  case $workdir in
    gs://?*) ;;
    *) problems+=("-- --workdir is '$workdir'; it must be in a bucket, as gs://bucket/run: the disks of a TPU go with it") ;;
  esac
  case $private in
    '' | gs://?*) ;;
    *)
      if [ -n "$spot" ]; then
        problems+=("-- --private is '$private'; with --spot it must be in a bucket: a preempted TPU takes its disks along, and a run without its keys cannot go on")
      else
        say "WARNING: --private=$private is on the disk of host 0, and is lost with the TPU"
      fi
      ;;
  esac
  case $config in
    '' | configs/*) ;;
    */* | *.py:*) problems+=("-- --config is '$config'; only configs/ of this checkout is copied, so the file must be in there") ;;
  esac
}

# ── The TPU ─────────────────────────────────────────────────────────────────────────────────────────────────

# Print the state of the TPU, as READY; nothing where there is none. Fails where gcloud cannot tell.
tpu_state() {
  gcloud compute tpus tpu-vm list "${at[@]}" --format='value(name.basename(),state)' | state_of_name
}

# Print the state of the request for it, as ACTIVE; nothing where there is none.
request_state() {
  gcloud compute tpus queued-resources list "${at[@]}" --format='value(name.basename(),state.state)' \
    | state_of_name
}

state_of_name() { awk -v name="$name" '$1 == name { print $2 }'; }

create() {
  has_tpu=1
  do_it gcloud compute tpus tpu-vm create "$name" "${at[@]}" --accelerator-type="$type" \
    --version="$runtime" ${spot:+--spot} ${create_flags[@]+"${create_flags[@]}"}
  is_new=1
}

queue() {
  has_tpu=1
  do_it gcloud compute tpus queued-resources create "$name" --node-id="$name" "${at[@]}" \
    --accelerator-type="$type" --runtime-version="$runtime" ${spot:+--spot} \
    ${create_flags[@]+"${create_flags[@]}"}
  is_new=1
}

# Wait until the TPU is there; fail if it will not come.
wait_for_tpu() {
  local tpu request
  if [ -n "$dry_run" ]; then
    echo "# every $poll s, until the TPU is READY:"
    dry_look
    return
  fi
  while :; do
    tpu=$(tpu_state)
    [ "$tpu" != READY ] || return 0
    request=$(request_state)
    say "the TPU: ${tpu:-not there}; the request: ${request:-none}"
    case $request/$tpu/$is_new in
      //1) ;;  # a new request may not be listed yet
      FAILED/* | SUSPEND*/* | DELETING/* | */PREEMPTED/* | */TERMINATED/* | */STOPPED/* | //)
        say "the TPU does not come; 'resume' asks for another one"
        return 1
        ;;
    esac
    sleep "$poll"
  done
}

dry_look() {
  quoted gcloud compute tpus tpu-vm list "${at[@]}" --format='value(name.basename(),state)'
  quoted gcloud compute tpus queued-resources list "${at[@]}" --format='value(name.basename(),state.state)'
}

# Make the TPU be there: wait for it, or ask for another one where it was preempted.
bring_up() {
  local tpu='' request=''
  if [ -n "$dry_run" ]; then
    dry_look
  else
    tpu=$(tpu_state)
    request=$(request_state)
    [ "$tpu" != READY ] || return 0
    while [ "$request" = SUSPENDING ] || [ "$request" = DELETING ] || [ "$tpu" = DELETING ]; do
      say "the TPU is on its way out"
      sleep "$poll"
      tpu=$(tpu_state)
      request=$(request_state)
    done
    case $request/$tpu in
      SUSPENDED/* | FAILED/* | */PREEMPTED | */TERMINATED)
        say "the TPU is gone (${tpu:-not there}; the request: ${request:-none}): asks for another one"
        delete_request "$request" --quiet
        request='' tpu=''
        ;;
    esac
  fi
  [ -n "$request$tpu" ] || queue
  step='wait'
  wait_for_tpu
}

# Delete the TPU by the way in which it was asked for.
delete_request() {
  local request=$1
  shift
  if [ -n "$request" ]; then
    do_it gcloud compute tpus queued-resources delete "$name" "${at[@]}" --force "$@"
  else
    do_it gcloud compute tpus tpu-vm delete "$name" "${at[@]}" "$@"
  fi
}

delete() {
  local request=''
  if [ -n "$dry_run" ]; then
    dry_look
    request=ACTIVE
  else
    request=$(request_state)
  fi
  delete_request "$request" ${yes:+--quiet}  # else gcloud asks
}

# ── Its hosts ───────────────────────────────────────────────────────────────────────────────────────────────

# Run a shell line on a worker, or on all.
on_workers() {
  do_it gcloud compute tpus tpu-vm ssh "$name" "${at[@]}" --quiet --worker="$1" --command="$2"
}

copy() {
  local folder=${TMPDIR:-/tmp}
  [ -n "$dry_run" ] || folder=$(mktemp -d)
  # Named one by one: nothing else of this folder, as runs/ and data/, may leave it.
  # shellcheck disable=SC2086
  COPYFILE_DISABLE=1 do_it tar -C "$root" --exclude=__pycache__ -czf "$folder/dpp_jax.tar.gz" $CODE
  do_it gcloud compute tpus tpu-vm scp "$folder/dpp_jax.tar.gz" "$name:dpp_jax.tar.gz" "${at[@]}" --quiet \
    --worker=all
  [ -n "$dry_run" ] || rm -rf "$folder"
}

install() {
  on_workers all "if [ -e $REMOTE ]; then bash $REMOTE idle; fi && mkdir -p dpp_jax && cd dpp_jax && \
rm -rf dpp_jax configs scripts && tar -xzf ../dpp_jax.tar.gz && bash scripts/worker.sh install '[tpu]'"
}

run() {
  local words=()
  [ -z "$port" ] || words=(env "JAX_COORDINATOR_PORT=$port")
  words+=(bash "$REMOTE" start .venv/bin/dpp-jax --distributed=auto "--hosts=$hosts" "${arguments[@]}")
  on_workers all "$(quoted "${words[@]}")"
}

# Print what worker.sh says of the run on host 0; nothing where it cannot be asked.
run_state() {
  on_workers 0 "if [ -e $REMOTE ]; then bash $REMOTE state; else echo none; fi" | tr -d '\r' | tail -n 1
}

# Print the log of host 0 until the run ends.
# Returns its status, and AGAIN where the same command goes on.
follow() {
  local state tpu lost=0 lines=+1
  while :; do
    on_workers 0 "bash $REMOTE follow $lines" || true
    [ -z "$dry_run" ] || return 0
    state=$(run_state) || state=''
    case $state in
      'ended 0') say 'everything is done'; return 0 ;;
      'ended 129' | 'ended 1'[3-5]?) say "the run was killed: $state"; return "$AGAIN" ;;
      'ended '*) return "${state#ended }" ;;
      none) say 'there is no run'; return 1 ;;
      running) lost=0 ;;
    esac
    tpu=$(tpu_state) || tpu=unknown
    case $tpu in READY | unknown) ;; *) say "the TPU: ${tpu:-not there}"; return "$AGAIN" ;; esac
    lost=$((lost + 1))
    [ "$lost" -lt "$LOST_CONNECTIONS" ] || { say "host 0 cannot be reached"; return 1; }
    sleep "$poll"
    lines=20
  done
}

# ── All of it ───────────────────────────────────────────────────────────────────────────────────────────────

go_on() {
  local status left=$restarts
  while :; do
    step=queue
    is_new=''
    bring_up
    has_tpu=1
    # Where nothing runs: copy and install again, which is quick where nothing changed.
    if [ -n "$is_new" ] || [ "$(run_state)" != running ]; then
      for step in copy install run; do "$step"; done
    fi
    step=follow
    status=0
    follow || status=$?
    [ "$status" -eq "$AGAIN" ] || break
    [ "$left" -gt 0 ] || { say "the run stopped, and --restarts=$restarts are used up"; break; }
    left=$((left - 1))
    say "the run stopped before its end; it goes on ($left restarts are left)"
  done
  [ "$status" -eq 0 ] || return "$status"
  if [ -n "$delete_when_done" ]; then
    step=delete yes=1
    delete
    has_tpu=''
  fi
}

at_end() {
  local status=$? here
  trap - EXIT
  [ -z "$dry_run" ] || exit "$status"
  here="--name=$name --zone=$zone${project:+ --project=$project}"
  case $status/$step in
    0/*) ;;
    130/follow) say "the run goes on; 'follow' shows it again, 'stop' lets it save and end" ;;
    *) say "$step ended with status $status; nothing after it was done" ;;
  esac
  [ -z "$has_tpu" ] \
    || say "the TPU $name may be there and COSTS MONEY until: bash scripts/launch_tpu_pod.sh delete $here"
  exit "$status"
}

command=${1:-help}
[ $# -eq 0 ] || shift
case $command in
  help | -h | --help)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"
    exit
    ;;
esac
parse "$@"
check
at=(--zone="$zone" ${project:+--project="$project"})
step=$command
trap at_end EXIT
case $command in
  all | resume) go_on ;;
  wait) has_tpu=1 && wait_for_tpu ;;
  status)
    if [ -n "$dry_run" ]; then
      dry_look
    else
      tpu=$(tpu_state)
      echo "the TPU: ${tpu:-not there}; the request: $(request_state)"
    fi
    [ -n "$dry_run" ] || [ "$tpu" = READY ] || exit 0
    on_workers 0 "bash $REMOTE state"
    ;;
  stop) on_workers all "bash $REMOTE stop" ;;
  copy | install | run | follow)
    has_tpu=1
    "$command"
    ;;
  *) "$command" ;;
esac
