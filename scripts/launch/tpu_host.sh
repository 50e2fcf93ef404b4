#!/usr/bin/env bash
# One host of a Cloud TPU slice: asks Cloud TPU's metadata which of how many it is, and goes on as train.sh.
#
#   bash scripts/launch/tpu_host.sh CONFIG.py RUN [settings …] [-- cluster options …]
set -euo pipefail

ask() {
  curl --silent --show-error --fail --retry 5 --header 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}
number=$(ask agent-worker-number)
# By commas, in the order of their numbers: an address each, or NAME:NUMBER:ADDRESS.
addresses=$(ask worker-network-endpoints)
IFS=, read -r -a hosts <<<"$addresses"

case " $* " in
*" -- "*) ;;
*) set -- "$@" -- ;;
esac
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" "$@" --cluster.coordinator "${hosts[0]##*:}:${PORT:-8476}" \
  --cluster.processes "${#hosts[@]}" --cluster.process "$number"
