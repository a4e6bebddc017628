#!/usr/bin/env bash
# Trains on one host with NVIDIA GPUs: checks the driver and what memory is free, sets what XLA should know, and goes on by
# itself when a run is cut short.
#
#   launch/gpu_host.sh [--tries N] [--busy] [--dry-run] CONFIG [key=value ...]
#
#   --tries N   give up after N runs in a row without a new checkpoint (default: 3)
#   --busy      train although other processes hold memory of the GPUs
#   --dry-run   check, and print what would be run
#
# One process takes all GPUs, or those in CUDA_VISIBLE_DEVICES. Exit codes are those of maxi; 75 and 6 run again, 2 to 5 stop.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
source "$here/lib.sh"

tries=3 busy="" DRY=""
while (($#)); do
  case $1 in
    --tries) tries=$(value "${@:1:2}") && shift ;;
    --busy) busy=1 ;;
    --dry-run) DRY=1 ;;
    -h | --help) usage "$0" && exit 0 ;;
    -*) die 2 "unknown option $1: --help shows what there is" ;;
    *) break ;;
  esac
  shift
done
(($#)) || die 2 "which config? --help shows how"
run_dir_of "$@" >/dev/null

command -v nvidia-smi >/dev/null || die 6 "there is no nvidia-smi: install the NVIDIA driver"
query=(nvidia-smi "--query-gpu=index,name,driver_version,memory.total,memory.used" "--format=csv,noheader,nounits")
if [[ ${CUDA_VISIBLE_DEVICES:-} =~ ^[0-9,]+$ ]]; then query+=(--id="$CUDA_VISIBLE_DEVICES"); fi
gpus=$("${query[@]}") || die 6 "nvidia-smi sees no GPU ($gpus)"
[[ $gpus ]] || die 6 "nvidia-smi sees no GPU"

# CUDA 12 needs driver 525, CUDA 13 needs 580 (jax's installation guide); jax itself would only say that it found no GPU.
maxi=$(find_maxi "$(dirname "$here")")
python="$(dirname "$(command -v "$maxi" || echo "$maxi")")/python"
[[ -x $python ]] || python=python3
cuda=$("$python" -c 'from importlib.metadata import distributions
names = {found.metadata["Name"].lower() for found in distributions()}
print(next((cuda for cuda in (13, 12) if f"jax-cuda{cuda}-plugin" in names), 0))') || cuda=0
((cuda)) || die 6 "jax has no CUDA here: pip install \"maxi[cuda13]\", or maxi[cuda12]"
least=$((cuda == 13 ? 580 : 525))

count=0
while IFS=, read -r index name driver total used; do
  name=${name# } driver=${driver# } total=${total# } used=${used# }
  ((${driver%%.*} >= least)) || die 6 "driver $driver is too old for CUDA $cuda, which needs $least: update it, or pip install \"maxi[cuda12]\""
  if ((used * 20 > total)) && [[ -z $busy ]]; then
    die 6 "GPU $index ($name) has $used of $total MiB in use: \`nvidia-smi\` shows by whom; --busy trains all the same"
  fi
  count=$((count + 1)) what="$name, driver $driver"
done <<<"$gpus"
say "$count x $what, CUDA $cuda"

# By default jax takes 75 % of the memory when it starts; nothing else runs here.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
if ((count > 1)); then
  # Gathering weights and scattering gradients then goes on beside the computation instead of between.
  export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS:-}"
fi
if [[ $DRY ]]; then
  show export XLA_PYTHON_CLIENT_MEM_FRACTION="$XLA_PYTHON_CLIENT_MEM_FRACTION"
  ((count == 1)) || show export XLA_FLAGS="$XLA_FLAGS"
fi
exec "$here/local.sh" --tries "$tries" ${DRY:+--dry-run} "$@"
