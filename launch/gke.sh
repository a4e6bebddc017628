#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster: fills in gke_jobset.yaml and hands it to kubectl.
#
#   launch/gke.sh --name NAME --image IMAGE --accelerator LABEL --topology TOPOLOGY [options] CONFIG run_dir=gs://BUCKET/FOLDER [key=value ...]
#
#   --name NAME               of the JobSet; `kubectl delete jobset NAME` ends it
#   --image IMAGE             has maxi and CONFIG in it: see launch/Dockerfile
#   --accelerator LABEL       tpu-v5-lite-podslice, tpu-v5p-slice or tpu-v6e-slice
#   --topology TOPOLOGY       of one slice, e.g. 4x4
#   --slices N                default: 1
#   --chips N                 chips of a host (default: 4)
#   --spot                    on nodes that may be taken away
#   --service-account NAME    of Kubernetes, that may use the bucket (default: default)
#   --max-restarts N          default: 20
#   --dry-run                 print the JobSet
#
# The cluster needs the JobSet controller and the Cloud Storage FUSE driver, and a node pool for each slice.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
source "$here/lib.sh"

name="" image="" accelerator="" topology="" slices=1 chips=4 spot=false account=default restarts=20 DRY=""
while (($#)); do
  case $1 in
    --name) name=$(value "${@:1:2}") && shift ;;
    --image) image=$(value "${@:1:2}") && shift ;;
    --accelerator) accelerator=$(value "${@:1:2}") && shift ;;
    --topology) topology=$(value "${@:1:2}") && shift ;;
    --slices) slices=$(value "${@:1:2}") && shift ;;
    --chips) chips=$(value "${@:1:2}") && shift ;;
    --spot) spot=true ;;
    --service-account) account=$(value "${@:1:2}") && shift ;;
    --max-restarts) restarts=$(value "${@:1:2}") && shift ;;
    --dry-run) DRY=1 ;;
    -h | --help) usage "$0" && exit 0 ;;
    -*) die 2 "unknown option $1: --help shows what there is" ;;
    *) break ;;
  esac
  shift
done
(($#)) || die 2 "which config? --help shows how"
[[ $name && $image && $accelerator && $topology ]] || die 2 "--name, --image, --accelerator and --topology are needed: --help shows how"
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || die 2 "--name $name: small letters, digits and dashes"
[[ $topology =~ ^[0-9]+(x[0-9]+){1,2}$ ]] || die 2 "--topology $topology: e.g. 4x4"
[[ $slices$chips$restarts =~ ^[0-9]+$ ]] || die 2 "--slices, --chips and --max-restarts take numbers"
config=$1
shift
run_dir=$(run_dir_of "$config" "$@")
[[ $run_dir == gs://*/* ]] || die 2 "run_dir has to be gs://BUCKET/FOLDER, since the pods leave nothing behind (run_dir=$run_dir)"
bucket=${run_dir#gs://}
hosts=$(((${topology//x/*}) / chips))
((hosts > 0)) || die 2 "a slice of $topology has no host of $chips chips"

# json TEXT: as a JSON string, which is YAML too.
json() {
  local text=${1//\\/\\\\}
  printf '"%s"' "${text//\"/\\\"}"
}
command="$(json maxi), $(json train), $(json "$config")"
for word in "$@"; do
  [[ $word == run_dir=* ]] || command+=", $(json "$word")"
done
command="[$command, $(json "run_dir=/bucket/${bucket#*/}")]"

text=$(sed '/^#/d' "$here/gke_jobset.yaml")
fill() { text=${text//"\${$1}"/"$2"}; }
fill NAME "$name"
fill IMAGE "$image"
fill ACCELERATOR "$accelerator"
fill TOPOLOGY "$topology"
fill SLICES "$slices"
fill HOSTS "$hosts"
fill CHIPS "$chips"
fill SPOT "$spot"
fill SERVICE_ACCOUNT "$account"
fill MAX_RESTARTS "$restarts"
fill BUCKET "${bucket%%/*}"
fill COMMAND "$command"
# nodes that are not spot have no such label at all
if [[ $spot == false ]]; then text=$(sed '/gke-spot/d; /tolerations:/d' <<<"$text"); fi
if [[ $DRY ]]; then
  printf '%s\n' "$text"
else
  command -v kubectl >/dev/null || die 6 "there is no kubectl"
  kubectl apply -f - <<<"$text"
  say "kubectl logs --follow --selector jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
fi
