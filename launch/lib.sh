# shellcheck shell=bash
# What the launchers share. It is sourced, never run.
#
# Exit codes drive them (README, "Exit codes"): 75 (asked to stop, all is saved) and 6 (the machine) run again, 2 to 5 stop, and
# so does 130 (somebody pressed Ctrl-C). Whatever else ends a run, a signal or a fault that nobody foresaw, may have been the
# machine's doing, so it runs again too. There is a pause before that, and an end to it: TRIES runs in a row that wrote no new
# checkpoint.

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

# die CODE WORDS...: one line, and the end.
die() {
  local code=$1
  shift
  printf '%s: error[%s] %s\n' "${0##*/}" "$code" "$*" >&2
  exit "$code"
}

# value OPTION VALUE: VALUE, which has to be there.
value() {
  (($# > 1)) || die 2 "$1 needs a value: --help shows how"
  printf '%s\n' "$2"
}

# The comment at the head of the script.
usage() { sed -n '2,/^[^#]*$/s/^# \{0,1\}//p' "$1"; }

# A command as one could type it.
show() {
  local line
  printf -v line '%q ' "$@"
  printf '%s\n' "${line% }"
}

# run COMMAND...: does it, or says it where DRY is set.
run() { if [[ ${DRY:-} ]]; then show "$@"; else "$@"; fi; }

# The command line in MAXI, on PATH, or in the environment that `make` makes.
find_maxi() {
  local ours="$1/.venv/bin/maxi"
  if [[ ${MAXI:-} ]]; then
    printf '%s\n' "$MAXI"
  elif command -v maxi >/dev/null; then
    echo maxi
  elif [[ -x $ours ]]; then
    printf '%s\n' "$ours"
  elif [[ ${DRY:-} ]]; then
    echo maxi
  else
    die 6 "there is no maxi on PATH: run \`make install\`, or activate its environment"
  fi
}

# run_dir_of CONFIG [key=value...]: the last run_dir=... of the command line, else that of the config.
run_dir_of() {
  local config=$1 word found
  shift
  [[ -f $config ]] || die 2 "there is no such config ($config)"
  found=$(sed -nE 's/^run_dir:[[:space:]]*["'\'']?([^"'\''#]*[^"'\''#[:space:]]).*$/\1/p' "$config" | head -n 1)
  for word in "$@"; do
    [[ $word != run_dir=* ]] || found=${word#run_dir=}
  done
  [[ $found ]] || die 2 "no run_dir ($config): add run_dir=FOLDER"
  printf '%s\n' "$found"
}

# newest_step RUN: the number of its newest checkpoint, -1 without one.
newest_step() {
  local path step newest=-1
  for path in "$1"/checkpoints/*/; do
    path=${path%/}
    step=${path##*/}
    if [[ $step =~ ^[0-9]+$ ]] && ((10#$step > newest)); then newest=$((10#$step)); fi
  done
  printf '%s\n' "$newest"
}

# verdict CODE: done, stop or again.
verdict() {
  case $1 in
    0) echo "done" ;;
    2 | 3 | 4 | 5 | 130) echo stop ;;
    *) echo again ;;
  esac
}

# worse CODE CODE: of the exit codes of two processes the one that tells why; those that only lost their peer end with 75.
worse() {
  local code rank best=-1 found=0
  for code in "$@"; do
    case $code in
      0) rank=0 ;;
      2 | 3 | 4 | 5) rank=4 ;;
      1) rank=3 ;;
      6) rank=2 ;;
      *) rank=1 ;;
    esac
    if ((rank > best)); then best=$rank found=$code; fi
  done
  printf '%s\n' "$found"
}

# pause_before FRUITLESS: seconds before the next run, after that many in a row without a new checkpoint.
pause_before() {
  local seconds=5
  if (($1 > 0)); then seconds=$((15 << ($1 > 5 ? 5 : $1 - 1))); fi
  printf '%s\n' "$((seconds > 300 ? 300 : seconds))"
}

# keep_running RUN TRIES COMMAND...: runs it until it is done or another run would not help; returns its last exit code.
# STOPPING, set by a trap, says that we were asked to stop ourselves.
keep_running() {
  local folder=$1 tries=$2 fruitless=0 before code pause
  shift 2
  while :; do
    before=$(newest_step "$folder")
    code=0
    "$@" || code=$?
    [[ $(verdict "$code") == again && -z ${STOPPING:-} ]] || return "$code"
    if (($(newest_step "$folder") > before)); then fruitless=0; else fruitless=$((fruitless + 1)); fi
    if ((fruitless >= tries)); then
      say "exit code $code, and $fruitless runs in a row without a new checkpoint: giving up"
      return "$code"
    fi
    pause=$(pause_before "$fruitless")
    say "exit code $code, the newest checkpoint is of step $(newest_step "$folder"): running again in $pause s"
    sleep "$pause" &
    wait "$!" || true # a signal ends the wait, not the sleep
    [[ -z ${STOPPING:-} ]] || return "$code"
  done
}
