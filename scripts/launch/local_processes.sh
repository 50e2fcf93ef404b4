#!/usr/bin/env bash
# Several processes of one run on this machine, as on several hosts: to try a cluster's settings, or a process a GPU.
#
#   bash scripts/launch/local_processes.sh N CONFIG.py RUN [settings …] [-- cluster options …]
#
# Each is a scripts/launch/train.sh, so that all of them go on from the last checkpoint where one is lost. Ends with the
# status of the first that did not end with 0. A signal to this script stops the run, which saves.
set -u

if [ $# -lt 3 ]; then
  echo "usage: bash scripts/launch/local_processes.sh N CONFIG.py RUN [settings ...] [-- cluster options ...]" >&2
  exit 2
fi
count=$1
shift
if ! [[ $count =~ ^[1-9][0-9]{0,5}$ ]]; then
  echo "N is '$count', not a number of processes; give 1 or more" >&2
  exit 2
fi
case " $* " in
*" -- "*) ;;
*) set -- "$@" -- ;;
esac
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
port=${PORT:-$((20000 + RANDOM % 20000))}

children=()
came=
stop() {
  came=yes
  for child in "${children[@]}"; do kill -TERM "$child" 2>/dev/null; done
}
trap stop TERM INT

for process in $(seq 0 $((count - 1))); do
  bash "$here/train.sh" "$@" \
    --cluster.coordinator "127.0.0.1:$port" --cluster.processes "$count" --cluster.process "$process" &
  children+=($!)
done
status=0
for child in "${children[@]}"; do
  came=yes
  while [ -n "$came" ]; do # a wait ends with a signal that comes; the process has yet to
    came=
    wait "$child"
    ended=$?
  done
  if [ "$ended" -ne 0 ] && [ "$status" -eq 0 ]; then status=$ended; fi
done
exit "$status"
