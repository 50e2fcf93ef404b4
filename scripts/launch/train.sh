#!/usr/bin/env bash
# One process of a run: `lm train`, and once more from the last checkpoint where it ended early.
#
#   bash scripts/launch/train.sh CONFIG.py RUN [settings …] [-- cluster options …]
#
# What stands behind -- goes to every attempt (--cluster.…); settings go to the first one alone, as a run that is resumed
# keeps its own. An attempt that ends with anything but 0 (finished) or 2 (a mistake in what was asked for) is followed by
# another, at most RETRIES times (default 3): 75 is a preemption, 1 a failure, 137 a kill. LM is the program (default: the
# one of .venv, or of the path).
set -u

if [ $# -lt 2 ]; then
  echo "usage: bash scripts/launch/train.sh CONFIG.py RUN [settings ...] [-- cluster options ...]" >&2
  exit 2
fi
config=$1 run=$2
shift 2
settings=() cluster=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  settings+=("$1")
  shift
done
[ $# -gt 0 ] && shift && cluster=("$@")

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
lm=${LM:-$root/.venv/bin/lm}
[ -x "$lm" ] || lm=lm

# A signal is passed on: the run saves, ends with 75, and is not begun again.
told=
child=
pass_on() {
  told=yes
  [ -n "$child" ] && kill -TERM "$child" 2>/dev/null
}
trap pass_on TERM INT

for attempt in $(seq 0 "${RETRIES:-3}"); do
  if [ -e "$run/config.json" ]; then
    set -- train --resume "$run"
  else
    set -- train "$config" --run "$run" ${settings[@]+"${settings[@]}"}
  fi
  "$lm" "$@" ${cluster[@]+"${cluster[@]}"} &
  child=$!
  wait "$child"
  status=$?
  # The wait ends with a signal that came; the process has yet to.
  while kill -0 "$child" 2>/dev/null; do
    wait "$child"
    status=$?
  done
  if [ $status -eq 0 ] || [ $status -eq 2 ] || [ -n "$told" ]; then exit "$status"; fi
  echo "attempt $((attempt + 1)) ended with status $status" >&2
  sleep "${PAUSE:-5}"
done
echo "given up after $((${RETRIES:-3} + 1)) attempts" >&2
exit "$status"
