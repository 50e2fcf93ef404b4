#!/usr/bin/env bash
# From nothing to a trained language model and its samples, in minutes on a laptop; run again, it continues.
source "$(dirname "$0")/common.sh"

run=${LM_RUN:-runs/quickstart}
set_up ""
lm=.venv/bin/lm

say() { printf '\n== %s\n' "$*"; }

# Exit status 75 means: stopped early, saved, resumable.
train() {
  local status=0
  "$lm" train "$@" || status=$?
  # A stop that the script asked for is part of the show; Ctrl-C and SIGTERM end the script too.
  if [ $status -eq 75 ] && grep -q '"asked to stop' "$run/status.json"; then return; fi
  [ $status -eq 0 ] || exit $status
}

if [ ! -f "$run/config.json" ]; then
  say "1. Train a small GPT on the Python standard library (about three minutes)"
  train configs/quickstart.py --run "$run" --stop-at 400 "$@"
fi
if ! grep -q '"finished"' "$run/status.json" 2>/dev/null; then
  say "2. How good is it so far? Bits per byte, beside two codes that know no language"
  "$lm" evaluate "$run" --baselines
  say "3. It was stopped before its end: resume it, from the last bit on"
  train --resume "$run"
fi
say "The finished model"
"$lm" evaluate "$run" --baselines
say "4. Three samples"
"$lm" generate "$run" --prompt "def __init__(self" "import " '    """Return ' \
  --max-new-tokens 100 --temperature 0.8 --top-p 0.95 --seed 1
say "Your run is in $run. Next:"
echo "  .venv/bin/lm generate $run --prompt 'class '"
echo "  .venv/bin/lm train configs/quickstart.py --data.source 'text:YOUR/TEXT/*.txt' --run runs/mine"
echo "  .venv/bin/lm train --help"
