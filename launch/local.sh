#!/usr/bin/env bash
# Trains on this machine, and goes on by itself when a run is cut short.
#
#   launch/local.sh [-n PROCESSES] [--tries N] [--port PORT] [--dry-run] CONFIG [key=value ...]
#
#   -n PROCESSES   several processes that train together, on the CPU (default: 1, which takes all devices that jax sees)
#   --tries N      give up after N runs in a row without a new checkpoint (default: 3)
#   --port PORT    where the processes meet (default: a free one)
#   --dry-run      print what would be run
#
# Ctrl-C or SIGTERM is passed on once: the run saves, and this script ends with 75. Exit codes are those of maxi; 75 and 6 run
# again, 2 to 5 stop.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
source "$here/lib.sh"

processes=1 tries=3 port="" DRY=""
while (($#)); do
  case $1 in
    -n) processes=$(value "${@:1:2}") && shift ;;
    --tries) tries=$(value "${@:1:2}") && shift ;;
    --port) port=$(value "${@:1:2}") && shift ;;
    --dry-run) DRY=1 ;;
    -h | --help) usage "$0" && exit 0 ;;
    -*) die 2 "unknown option $1: --help shows what there is" ;;
    *) break ;;
  esac
  shift
done
(($#)) || die 2 "which config? --help shows how"
[[ $processes =~ ^[1-9][0-9]*$ && $tries =~ ^[1-9][0-9]*$ ]] || die 2 "-n and --tries take numbers from 1"
config=$1
shift
run_dir=$(run_dir_of "$config" "$@")
maxi=$(find_maxi "$(dirname "$here")")

line=("$maxi" train "$config" "$@")
if [[ " $*" != *" run_dir="* ]]; then line+=("run_dir=$run_dir"); fi
if ((processes > 1)); then
  export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} # one process takes all GPUs by itself
  [[ $port ]] || port=$(((RANDOM << 2) % 20000 + 20000))
fi

# command_of I: the command of process I, in `each`.
command_of() {
  each=("${line[@]}")
  if ((processes > 1)); then
    each=(env JAX_PLATFORMS="$JAX_PLATFORMS" JAX_COORDINATOR_ADDRESS="localhost:$port" JAX_NUM_PROCESSES="$processes" JAX_PROCESS_ID="$1" "${line[@]}")
  fi
}

declare -A alive=()
STOPPING=""
stop() {
  STOPPING=1
  ((${#alive[@]} == 0)) || kill -TERM "${!alive[@]}" 2>/dev/null || true
}
trap stop TERM INT HUP

# One life: all processes to their ends; returns the code that tells why.
life() {
  local number code ended all=0
  for ((number = 0; number < processes; number++)); do
    command_of "$number"
    if ((number)); then
      "${each[@]}" > >(sed -u "s/^/[$number] /" >&2) 2>&1 &
    else
      "${each[@]}" &
    fi
    alive[$!]=$number
  done
  while ((${#alive[@]})); do
    code=0 ended=""
    wait -n -p ended "${!alive[@]}" || code=$?
    [[ ${ended:-} ]] || continue # a signal came, which the trap has passed on
    unset "alive[$ended]"
    all=$(worse "$all" "$code")
    # Those that still wait for a peer at the start would wait long. After 75 they are saving, and a second signal would stop that.
    if ((code && code != 75 && ${#alive[@]})); then kill -TERM "${!alive[@]}" 2>/dev/null || true; fi
  done
  if ((processes > 1)) && [[ $(verdict "$all") == again ]]; then port=$((port + 1)); fi # the old one may still be held
  return "$all"
}

if [[ $DRY ]]; then
  for ((number = 0; number < processes; number++)); do
    command_of "$number"
    show "${each[@]}"
  done
  exit 0
fi
keep_running "$run_dir" "$tries" life
