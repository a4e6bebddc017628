#!/usr/bin/env bash
# What tpu_pod.sh has the workers of a slice do. It is copied there with the code; nobody needs to call it by hand.
#
#   tpu_worker.sh install ARCHIVE          unpacks the code into ~/maxi and installs it, unless that was done
#   tpu_worker.sh share RUN_DIR            makes RUN_DIR one folder that all workers see
#   tpu_worker.sh start RUN_DIR ARGS...    starts `maxi train ARGS...`, unless it runs
#   tpu_worker.sh status RUN_DIR           prints `running STEP`, `exit CODE STEP` or `dead -1 STEP`; STEP: of the newest checkpoint
#   tpu_worker.sh log LINES                shows the log, from LINES on (as tail takes it), while the run goes on
#   tpu_worker.sh stop                     asks the run to save and end
#   tpu_worker.sh pack RUN_DIR STEP...     writes RUN_DIR as a tar archive, of checkpoints the newest unless it is one of STEP...
#   tpu_worker.sh unpack RUN_DIR ARCHIVE   puts such an archive back
#
# RUN_DIR is relative to ~/maxi, or gs://BUCKET/FOLDER.
set -euo pipefail

BUCKETS="$HOME/maxi-buckets"

# place RUN_DIR: where it is on this worker.
place() {
  case $1 in
    gs://*) printf '%s\n' "$BUCKETS/${1#gs://}" ;;
    *) printf '%s\n' "$HOME/maxi/$1" ;;
  esac
}

metadata() {
  curl --silent --fail --retry 5 --header "Metadata-Flavor: Google" \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

install() {
  local archive=$1 sum
  sum=$(sha256sum <"$archive")
  [[ $(cat "$HOME/maxi/.installed" 2>/dev/null) != "$sum" ]] || return 0
  mkdir -p "$HOME/maxi"
  tar -xzf "$archive" -C "$HOME/maxi"
  # images of Cloud TPU have Python 3.10, which is too old; uv brings another
  export PATH="$HOME/.local/bin:$PATH"
  command -v uv >/dev/null || curl --silent --show-error --fail --location --retry 5 https://astral.sh/uv/install.sh | sh
  cd "$HOME/maxi"
  [[ -x .venv/bin/python ]] || uv venv --quiet --python 3.12 .venv
  uv pip install --quiet --python .venv/bin/python --editable '.[tpu]'
  printf '%s\n' "$sum" >.installed
}

# A bucket is mounted on every worker; otherwise the folder lies on worker 0's disk, from where the others mount it.
share() {
  local folder endpoints number first how
  folder=$(place "$1")
  if [[ $1 == gs://* ]]; then
    mount_bucket "${1#gs://}"
    mkdir -p "$folder"
    return
  fi
  mkdir -p "$folder"
  endpoints=$(metadata worker-network-endpoints)
  [[ $endpoints == *,* ]] || return 0
  number=$(metadata agent-worker-number)
  if ((number == 0)); then
    command -v exportfs >/dev/null || apt_get nfs-kernel-server
    # whoever writes, the files are this user's, whose number differs between workers
    how="(rw,sync,no_subtree_check,all_squash,anonuid=$(id -u),anongid=$(id -g))"
    printf '%s %s %s %s\n' "$folder" "10.0.0.0/8$how" "172.16.0.0/12$how" "192.168.0.0/16$how" | # private networks
      sudo tee /etc/exports.d/maxi.exports >/dev/null
    sudo exportfs -ra
    return
  fi
  mountpoint --quiet "$folder" && return
  command -v mount.nfs4 >/dev/null || apt_get nfs-common
  first=${endpoints%%,*} # a host, or name:id:ip
  # nothing is remembered of folders, so that a checkpoint is seen by all as soon as it is there
  for _ in {1..30}; do
    sudo mount -t nfs4 -o lookupcache=none,actimeo=0 "${first##*:}:$folder" "$folder" && return
    sleep 10 # worker 0 may not be ready
  done
  echo "tpu_worker.sh: cannot mount $folder of worker 0 (${first##*:})" >&2
  return 1
}

mount_bucket() {
  local bucket=${1%%/*}
  mountpoint --quiet "$BUCKETS/$bucket" && return
  if ! command -v gcsfuse >/dev/null; then
    curl --silent --fail --retry 5 https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
    echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    apt_get gcsfuse
  fi
  mkdir -p "$BUCKETS/$bucket"
  # a checkpoint gets its name by renaming a folder, which a bucket without folders of its own does file by file
  gcsfuse --implicit-dirs --rename-dir-limit 1000000 --stat-cache-ttl 0s --type-cache-ttl 0s "$bucket" "$BUCKETS/$bucket"
}

# A fresh machine updates itself in the background, which holds apt's lock.
apt_get() {
  sudo apt-get --quiet --option DPkg::Lock::Timeout=600 update >&2
  sudo DEBIAN_FRONTEND=noninteractive apt-get --quiet --yes --option DPkg::Lock::Timeout=600 install "$@" >&2
}

# The process of before a reboot is gone, whoever has its number now.
boot() { cat /proc/sys/kernel/random/boot_id; }

is_running() {
  local pid booted
  [[ ! -f $HOME/maxi.exit ]] || return 1
  read -r pid booted 2>/dev/null <"$HOME/maxi.pid" && [[ $booted == "$(boot)" ]] && kill -0 "$pid" 2>/dev/null
}

start() {
  local folder
  folder=$(place "$1")
  shift
  if is_running; then return 0; fi
  rm -f "$HOME/maxi.exit"
  cd "$HOME/maxi"
  # shellcheck source=/dev/null
  if [[ -f launch.env ]]; then source launch.env; fi
  # shellcheck disable=SC2016
  setsid nohup bash -c 'trap : TERM; "$@"; echo "$?" >"$HOME/maxi.exit"' maxi .venv/bin/maxi train "$@" run_dir="$folder" \
    >"$HOME/maxi.log" 2>&1 </dev/null &
  echo "$! $(boot)" >"$HOME/maxi.pid"
}

status() {
  local step
  step=$(newest_step "$(place "$1")")
  if [[ -f $HOME/maxi.exit ]]; then
    echo "exit $(cat "$HOME/maxi.exit") $step"
  elif is_running; then
    echo "running $step"
  else
    echo "dead -1 $step"
  fi
}

log() { exec tail -n "$1" --pid "$(cut -d ' ' -f 1 "$HOME/maxi.pid")" -F "$HOME/maxi.log"; }

# The session that start made is a process group.
stop() { ! is_running || kill -TERM -- "-$(cut -d ' ' -f 1 "$HOME/maxi.pid")"; }

pack() {
  local folder newest copy
  folder=$(place "$1")
  newest=$(newest_step "$folder")
  shift
  copy="$folder/.pack"
  rm -rf "$copy"
  mkdir -p "$copy/checkpoints"
  # links, since the run may remove the checkpoint meanwhile
  if ((newest >= 0)) && [[ " $* " != *" $newest "* ]]; then
    cp --archive --link "$folder/checkpoints/$newest" "$copy/checkpoints/" 2>/dev/null || rm -rf "$copy/checkpoints/$newest"
  fi
  find "$folder" -mindepth 1 -maxdepth 1 ! -name checkpoints ! -name .pack ! -name lock -exec cp --archive --target-directory "$copy" {} +
  tar -cf - -C "$copy" .
  rm -rf "$copy"
}

unpack() {
  local folder
  folder=$(place "$1")
  mkdir -p "$folder"
  tar -xf "$2" -C "$folder"
  rm -f "$2"
}

command=$1
shift
if [[ $command != install ]]; then
  # shellcheck source=launch/lib.sh
  source "$HOME/maxi/launch/lib.sh"
fi
"$command" "$@"
