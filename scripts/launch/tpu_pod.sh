#!/usr/bin/env bash
# A run on a Cloud TPU slice: asks for the slice in the queue, or takes it if it is there, and trains on all of its hosts.
#
#   bash scripts/launch/tpu_pod.sh up NAME               waits until the slice is there, and installs this repository
#   bash scripts/launch/tpu_pod.sh train NAME CONFIG.py RUN [settings …] [-- cluster options …]
#   bash scripts/launch/tpu_pod.sh logs NAME             what the first host writes, as it comes
#   bash scripts/launch/tpu_pod.sh stop NAME             a SIGTERM to all hosts: the run saves and ends
#   bash scripts/launch/tpu_pod.sh down NAME             gives the slice back; what lies on its disks is lost
#
# ZONE (us-east5-a), TYPE (v5p-128) and VERSION (v2-alpha-tpuv5, the image that goes with the type) are set in the
# environment; SPOT=1 asks for a slice that may be taken away, PROJECT for another project than gcloud's own. The working
# tree as committed goes to ~/lm on every host. RUN and the dataset must lie where all hosts see them: a mounted bucket or
# disk. `train` ends at once; on each host scripts/launch/train.sh goes on, and begins again from the last checkpoint
# where an attempt fails. A slice that was taken away is asked for again with `up`, and `train` resumes RUN.
set -euo pipefail

usage() { # what was wrong; then what stands above
  echo "$1" >&2
  sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
}
[ $# -ge 2 ] || usage "an action and a NAME are wanted:"
what=$1 name=$2
shift 2
zone=(--zone "${ZONE:-us-east5-a}" --quiet ${PROJECT:+--project "$PROJECT"})
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

queued() { gcloud compute tpus queued-resources "$@" "${zone[@]}"; }
on() { # a command on one host, or on all
  gcloud compute tpus tpu-vm ssh "$name" "${zone[@]}" --worker="$1" --command="$2"
}
state() { queued describe "$name" --format='value(state.state)' 2>/dev/null || echo none; }

case $what in
up)
  case $(state) in
  FAILED | SUSPENDED | SUSPENDING)
    queued delete "$name" --force
    ;;
  esac
  if [ "$(state)" = none ]; then
    queued create "$name" --node-id="$name" --accelerator-type="${TYPE:-v5p-128}" \
      --runtime-version="${VERSION:-v2-alpha-tpuv5}" ${SPOT:+--spot}
  fi
  until [ "$(state)" = ACTIVE ]; do
    case $(state) in
    FAILED | SUSPENDED | none)
      echo "the request for $name came to nothing: $(state); run this again to ask once more" >&2
      exit 1
      ;;
    esac
    echo "$name: $(state)"
    sleep "${PAUSE:-30}"
  done
  archive=$(mktemp -d)/lm.tar.gz
  git -C "$root" archive --format=tar.gz --prefix=lm/ --output="$archive" HEAD
  gcloud compute tpus tpu-vm scp "$archive" "$name:" "${zone[@]}" --worker=all
  on all 'tar xzf lm.tar.gz && cd lm && python3 -m venv .venv && .venv/bin/pip install -q -e . "jax[tpu]"'
  echo "$name is ready; next: bash scripts/launch/tpu_pod.sh train $name CONFIG.py RUN"
  ;;
train)
  [ $# -ge 2 ] || usage "'train $name' wants CONFIG.py and RUN:"
  # All hosts start in the same second or so; each learns who the others are from Cloud TPU's metadata.
  on all "cd lm && nohup bash scripts/launch/tpu_host.sh $(printf '%q ' "$@")>> ~/lm.log 2>&1 < /dev/null &"
  echo "started; next: bash scripts/launch/tpu_pod.sh logs $name"
  ;;
logs) on 0 'tail -n 100 -F lm.log' ;;
stop) on all 'pkill -TERM -f scripts/launch/train.sh' ;;
down) queued delete "$name" --force ;;
*) usage "unknown action '$what'; there are up, train, logs, stop and down:" ;;
esac
