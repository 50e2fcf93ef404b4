#!/usr/bin/env bash
# One process of a run: `lm train`, and once more from the last checkpoint where it ended early.
#
#   bash scripts/launch/train.sh CONFIG.py RUN [settings …] [-- cluster options …]
#
# What stands behind -- goes to every attempt (--cluster.…); settings go to the first one alone, as a run that is resumed
# keeps its own. An attempt that ends with anything but 0 (finished) or 2 (a mistake in what was asked for) is followed by
# another, PAUSE seconds (default 5) later and at most RETRIES times (default 3): 75 is a preemption, 1 a failure, 137 a
# kill. LM is the program (default: the one of .venv, or of the path).
set -u

if [ $# -lt 2 ]; then
  echo "usage: bash scripts/launch/train.sh CONFIG.py RUN [settings ...] [-- cluster options ...]" >&2
  exit 2
fi
retries=${RETRIES:-3} pause=${PAUSE:-5}
if ! [[ $retries =~ ^[0-9]{1,9}$ ]]; then
  echo "RETRIES is '$retries', not a number of attempts; give 0 or more" >&2
  exit 2
fi
if ! [[ $pause =~ ^[0-9]+(\.[0-9]+)?$ ]]; then
  echo "PAUSE is '$pause', not a number of seconds; give 0 or more" >&2
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

# A signal is passed on: the run saves, ends with 75, and is not begun again; nor is it where the signal comes between
# two attempts, which ends the pause.
told=
came=
child=
pass_on() {
  told=yes came=yes
  [ -n "$child" ] && kill -TERM "$child" 2>/dev/null
}
trap pass_on TERM INT

status=75 # for a signal that comes before the first attempt
for ((attempt = 1; attempt <= 10#$retries + 1; attempt++)); do
  if [ -n "$told" ]; then exit "$status"; fi
  if [ -e "$run/config.json" ]; then
    set -- train --resume "$run"
  else
    set -- train "$config" --run "$run" ${settings[@]+"${settings[@]}"}
  fi
  "$lm" "$@" ${cluster[@]+"${cluster[@]}"} &
  child=$!
  if [ -n "$told" ]; then pass_on; fi # it came before there was a child to tell
  # A wait ends with a signal that comes, and says so; what the process ends with is known after one that none ended.
  came=yes
  while [ -n "$came" ]; do
    came=
    wait "$child"
    status=$?
  done
  child=
  if [ "$status" -eq 0 ] || [ "$status" -eq 2 ] || [ -n "$told" ]; then exit "$status"; fi
  echo "attempt $attempt ended with status $status" >&2
  sleep "$pause" &
  child=$!
  if [ -n "$told" ]; then pass_on; fi
  wait "$child"
  child=
done
if [ -n "$told" ]; then exit "$status"; fi
echo "given up after $((10#$retries + 1)) attempts" >&2
exit "$status"
