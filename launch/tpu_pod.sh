#!/usr/bin/env bash
# Trains on a slice of Cloud TPU: asks for it, copies the code there, installs it, runs it on all workers, shows what the first of
# them says, and when the slice is taken away gets another and goes on. At the end the slice is deleted.
#
#   launch/tpu_pod.sh --name NAME --zone ZONE --type TYPE [options] CONFIG run_dir=FOLDER [key=value ...]
#   launch/tpu_pod.sh --name NAME --zone ZONE --delete CONFIG run_dir=FOLDER
#
#   --name NAME        of the queued resource and its node; the same name finds a slice that is there
#   --zone ZONE        e.g. europe-west4-b
#   --type TYPE        e.g. v5litepod-16, v5p-32, v6e-16
#   --project PROJECT  default: gcloud's
#   --spot             much cheaper, and may be taken away at any time
#   --reserved         from a reservation
#   --runtime VERSION  software of the machines (default: what Cloud TPU names for the type)
#   --copy PATH        copy this file or folder too, e.g. data or a tokenizer, relative to here; may be repeated
#   --env NAME         give the run this variable, e.g. WANDB_API_KEY; may be repeated
#   --sync MINUTES     how often FOLDER is fetched from the slice (default: 10); not for a bucket
#   --tries N          give up after N runs or slices in a row without a new checkpoint (default: 3)
#   --keep             do not delete the slice at the end
#   --delete           have a run that is under way save, fetch FOLDER, delete the slice, and that is all
#   --dry-run          print what would be run, in order
#
# FOLDER is gs://BUCKET/FOLDER, which every worker mounts with gcsfuse, or a folder below this one. Then it lies on worker 0's disk
# (100 GB), the other workers use it by NFS, and it is fetched to here as the run goes on and put back onto a new slice.
# CONFIG is a file below this folder. Ctrl-C ends this script alone: the run and its cost go on, the same command finds them again.
# Exit codes are those of maxi; 75 and 6 run again, 2 to 5 end it and delete the slice.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
source "$here/lib.sh"
root=$(dirname "$here")
POLL=30 # seconds between looks
LOST=10 # looks in a row without an answer after which a slice is given up

name="" zone="" type="" runtime="" tries=3 sync=10 keep="" delete="" DRY=""
project=() tier=() copies=() variables=()
while (($#)); do
  case $1 in
    --name) name=$(value "${@:1:2}") && shift ;;
    --zone) zone=$(value "${@:1:2}") && shift ;;
    --type) type=$(value "${@:1:2}") && shift ;;
    --project) project=(--project "$(value "${@:1:2}")") && shift ;;
    --runtime) runtime=$(value "${@:1:2}") && shift ;;
    --spot | --reserved) tier=("$1") ;;
    --copy) copies+=("$(value "${@:1:2}")") && shift ;;
    --env) variables+=("$(value "${@:1:2}")") && shift ;;
    --sync) sync=$(value "${@:1:2}") && shift ;;
    --tries) tries=$(value "${@:1:2}") && shift ;;
    --keep) keep=1 ;;
    --delete) delete=1 ;;
    --dry-run) DRY=1 ;;
    -h | --help) usage "$0" && exit 0 ;;
    -*) die 2 "unknown option $1: --help shows what there is" ;;
    *) break ;;
  esac
  shift
done
(($#)) || die 2 "which config? --help shows how"
config=$1
shift
run_dir=$(run_dir_of "$config" "$@")
[[ $name && $zone ]] || die 2 "--name and --zone say which slice"
[[ $type || $delete ]] || die 2 "--type says what to ask for, e.g. v5litepod-16"
[[ $tries =~ ^[1-9][0-9]*$ && $sync =~ ^[1-9][0-9]*$ ]] || die 2 "--tries and --sync take numbers from 1"
for path in "$config" "${copies[@]}" "${run_dir#gs://}"; do
  [[ $path != /* && /$path/ != */../* ]] || die 2 "$path is not below this folder, so there is no such place on the slice"
done
for path in "${copies[@]}"; do [[ -e $path ]] || die 2 "--copy: there is no $path"; done
for variable in "${variables[@]}"; do [[ ${!variable+x} ]] || die 2 "--env: $variable is not set"; done
command -v gcloud >/dev/null || [[ $DRY ]] || die 6 "there is no gcloud: https://cloud.google.com/sdk/docs/install"
overrides=()
for word in "$@"; do [[ $word == run_dir=* ]] || overrides+=("$word"); done
# what is wrong with the config costs nothing yet
if maxi=$(DRY="" find_maxi "$root" 2>/dev/null); then "$maxi" config "$config" "$@" >/dev/null; fi

# https://cloud.google.com/tpu/docs/runtimes
case $type in
  v5litepod-*) runtime=${runtime:-v2-alpha-tpuv5-lite} ;;
  v5p-*) runtime=${runtime:-v2-alpha-tpuv5} ;;
  v6e-*) runtime=${runtime:-v2-alpha-tpuv6e} ;;
  *) runtime=${runtime:-tpu-ubuntu2204-base} ;;
esac

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
archive="$scratch/maxi.tgz"

# ---- what is asked of Google ----

# tpus GROUP VERB NAME...: one call of gcloud.
tpus() { run gcloud compute tpus "$@" --zone "$zone" "${project[@]}" --quiet; }

# on WORKER COMMAND...: has a worker, or all, do it.
on() {
  local worker=$1 command
  shift
  printf -v command '%q ' "$@"
  tpus tpu-vm ssh "$name" --worker "$worker" --command "${command% }"
}

# worker WHICH VERB...: tpu_worker.sh there.
worker() {
  local which=$1
  shift
  # shellcheck disable=SC2088
  tpus tpu-vm ssh "$name" --worker "$which" --command "bash ~/maxi/launch/tpu_worker.sh $(show "$@")"
}

# ready, absent, gone (taken away, or never given), waiting, or unknown when there is no answer.
slice() {
  local state node
  : >"$scratch/error"
  if ! state=$(tpus queued-resources describe "$name" --format 'value(state.state)' 2>"$scratch/error"); then
    if grep -q NOT_FOUND "$scratch/error"; then : >"$scratch/error" && echo absent; else echo unknown; fi
    return
  fi
  case $state in
    ACTIVE) ;;
    FAILED | SUSPENDED) echo gone && return ;;
    *) echo waiting && return ;;
  esac
  node=$(tpus tpu-vm describe "$name" --format 'value(state)' 2>/dev/null) || node=unknown
  case $node in
    READY) echo ready ;;
    PREEMPTED | TERMINATED | STOPPED) echo gone ;;
    unknown) echo unknown ;;
    *) echo waiting ;;
  esac
}

create() {
  tpus queued-resources create "$name" --node-id "$name" --accelerator-type "$type" --runtime-version "$runtime" "${tier[@]}"
}

remove() { tpus queued-resources delete "$name" --force; }

# Asks for the slice unless it is there, and waits for it, however long that takes.
await() {
  local now before="" # unknown is waited out too: it is more likely us than the slice who has no network
  if [[ $DRY ]]; then
    create
    tpus queued-resources describe "$name" --format 'value(state.state)'
    tpus tpu-vm describe "$name" --format 'value(state)'
    return
  fi
  while :; do
    now=$(slice)
    [[ $now == "$before" ]] || say "slice $name: $now$(head -n 1 "$scratch/error" | sed 's/^/ /')"
    before=$now
    case $now in
      ready) return ;;
      absent) create || return ;;
      gone) remove || true ;;
    esac
    sleep "$POLL"
  done
}

# ---- the code, and the run folder where there is no bucket ----

pack_code() {
  local variable
  : >"$scratch/launch.env"
  for variable in "${variables[@]}"; do show export "$variable=${!variable}" >>"$scratch/launch.env"; done
  chmod 600 "$scratch/launch.env"
  run tar --exclude=__pycache__ -czf "$archive" -C "$root" maxi launch configs pyproject.toml README.md LICENSE \
    -C "$scratch" launch.env -C "$PWD" "$config" "${copies[@]}"
}

copy_code() {
  tpus tpu-vm scp "$archive" "$here/tpu_worker.sh" "$name:" --worker all &&
    on all bash tpu_worker.sh install maxi.tgz &&
    worker 0 share "$run_dir" && # the others mount what this one offers
    worker all share "$run_dir"
}

# steps_here: the checkpoints that have been fetched.
steps_here() {
  local path
  for path in "$run_dir"/checkpoints/*/; do
    path=${path%/}
    if [[ ${path##*/} =~ ^[0-9]+$ ]]; then printf '%s\n' "${path##*/}"; fi
  done
}

fetch() {
  local have=() old
  [[ $run_dir != gs://* ]] || return 0
  if [[ $DRY ]]; then
    worker 0 pack "$run_dir"
    return
  fi
  mapfile -t have < <(steps_here)
  mkdir -p "$run_dir/checkpoints" "$run_dir/.fetched"
  if worker 0 pack "$run_dir" "${have[@]}" >"$scratch/run.tar" && tar -xf "$scratch/run.tar" -C "$run_dir/.fetched" 2>/dev/null; then
    for path in "$run_dir"/.fetched/checkpoints/*/; do
      if [[ -d $path ]]; then mv "$path" "$run_dir/checkpoints/"; fi # it gets its name when it is whole
    done
    rm -rf "$run_dir/.fetched/checkpoints"
    cp -a "$run_dir/.fetched/." "$run_dir/"
    mapfile -t have < <(steps_here | sort -n)
    for old in "${have[@]:0:$((${#have[@]} > 2 ? ${#have[@]} - 2 : 0))}"; do rm -rf "$run_dir/checkpoints/$old"; done
  else
    say "the run folder could not be fetched this time"
  fi
  rm -rf "$run_dir/.fetched" "$scratch/run.tar"
}

# Puts the run folder onto a slice that has less of it.
put_back() {
  local there
  [[ $run_dir != gs://* && -d $run_dir/checkpoints ]] || return 0
  if [[ $DRY ]]; then
    worker 0 status "$run_dir"
    there=-1
  else
    there=$(worker 0 status "$run_dir") || return
  fi
  ((${there##* } < $(newest_step "$run_dir"))) || return 0
  run tar -cf "$scratch/run.tar" -C "$run_dir" . &&
    tpus tpu-vm scp "$scratch/run.tar" "$name:" --worker 0 &&
    worker 0 unpack "$run_dir" run.tar
}

# ---- one run, and the next ----

start() { worker all start "$run_dir" "$config" "${overrides[@]}"; }

# To be run in the background, where it is one process that can be killed.
# shellcheck disable=SC2088
show_log() {
  local line=(gcloud compute tpus tpu-vm ssh "$name" --worker 0 --command "bash ~/maxi/launch/tpu_worker.sh log $1")
  line+=(--zone "$zone" "${project[@]}" --quiet)
  if [[ $DRY ]]; then show "${line[@]}"; else exec "${line[@]}"; fi
}

# Shows the log and looks after the run until it ends: 0 with its exit code in `code`, 1 when the slice is lost.
follow() {
  local lost=0 looks=0 shown="" said lines=+1
  while :; do
    if [[ -z $shown ]] || ! kill -0 "$shown" 2>/dev/null; then
      show_log "$lines" 2>/dev/null &
      shown=$! lines=0
    fi
    sleep "$POLL"
    said=$(worker 0 status "$run_dir" 2>/dev/null) || said=lost
    if [[ $said == lost ]]; then
      case $(slice) in
        gone | absent) break ;;
        unknown) ;; # it is us who have no network
        *) lost=$((lost + 1)) ;;
      esac
      if ((lost >= LOST)); then break; fi
      continue
    fi
    lost=0 looks=$((looks + 1)) step=${said##* }
    if [[ $said != running* ]]; then
      sleep 3 # for the last lines
      kill "$shown" 2>/dev/null || true
      code=$(exit_code)
      return 0
    fi
    if ((looks * POLL % (sync * 60) < POLL)); then fetch; fi
  done
  kill "$shown" 2>/dev/null || true
  return 1
}

# The code of the worker that tells why, once all have ended; -1 of a machine that was started anew counts as 6.
exit_code() {
  local said codes
  for _ in {1..10}; do
    said=$(worker all status "$run_dir" 2>/dev/null) || said=""
    [[ $said == *running* || -z $said ]] || break
    sleep "$POLL"
  done
  mapfile -t codes < <(sed -nE 's/^(exit|dead) (-?[0-9]+) .*/\2/p' <<<"$said" | sed 's/^-1$/6/')
  worse "${codes[@]:-6}"
}

finish() {
  fetch
  if [[ $keep ]]; then say "slice $name is kept, and costs: --delete ends that"; else remove || true; fi
  exit "$1"
}

if [[ $delete ]]; then
  if [[ $DRY || $(slice) == ready ]]; then
    worker all stop || true
    [[ $DRY ]] || exit_code >/dev/null # when they have ended
    fetch
  fi
  remove
  exit 0
fi

pack_code
if [[ $DRY ]]; then
  await
  copy_code
  put_back
  start
  show_log +1
  worker 0 status "$run_dir"
  worker all status "$run_dir"
  finish 0
fi
trap 'say "the run goes on without this script; the same command finds it, --delete ends it"; kill $(jobs -p) 2>/dev/null; exit 130' INT TERM
fruitless=0 step=-1
while :; do
  before=$step code=6 ended="" lost=""
  if await && copy_code && put_back && start; then
    if follow; then ended=1; else lost=1; fi
  fi
  if [[ $ended && $(verdict "$code") != again ]]; then finish "$code"; fi
  why="the slice could not be prepared"
  [[ -z $ended ]] || why="exit code $code"
  now=$(slice)
  if [[ $lost || $now == @(gone|absent) ]]; then
    why="the slice was taken away"
    [[ $now != ready ]] || why="the slice does not answer"
    [[ $now == absent ]] || remove || true
  elif [[ $ended ]]; then
    fetch
  fi
  if ((step > before)); then fruitless=0; else fruitless=$((fruitless + 1)); fi
  if ((fruitless >= tries)); then
    say "$why, and $fruitless runs in a row without a new checkpoint: giving up"
    finish "$code"
  fi
  pause=$(pause_before "$fruitless")
  say "$why, the newest checkpoint is of step $step: going on in $pause s"
  sleep "$pause"
done
