# shellcheck shell=bash
# Sourced by the other scripts: goes to the repository's top and makes .venv, once.
# Exact versions that were tested stand in requirements/pyX.Y.txt; a Python without such a file gets tested ranges.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The first Python that will do; LM_PYTHON names another.
find_python() {
  local candidate
  for candidate in ${LM_PYTHON:-} python3 python3.12 python3.11; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  echo "lm needs Python 3.11 or newer with venv and pip; found: $(python3 --version 2>&1 || true)." >&2
  echo "Install one (Debian: apt install python3 python3-venv), or name it: LM_PYTHON=/path/to/python3.12" >&2
  exit 2
}

# set_up EXTRAS: installs this package with its extras (such as "test,parity"; may be empty) into .venv.
set_up() {
  local extras=$1 python version lock target stamp
  python=.venv/bin/python
  [ -x $python ] || python=$(find_python)
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  lock=requirements/py$version.txt
  [ -f "$lock" ] || lock=/dev/null
  target=.${extras:+[$extras]}
  stamp=.venv/.installed-${extras:-run}-$(cat "$lock" requirements.txt pyproject.toml | cksum | cut -d' ' -f1)
  [ -f "$stamp" ] && return
  echo "setting up .venv with Python $version; this happens once" >&2
  if command -v uv >/dev/null 2>&1; then
    [ -x .venv/bin/python ] || uv venv --quiet --python "$python" .venv
    uv pip install --quiet --python .venv/bin/python --constraint "$lock" --editable "$target"
  else
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint "$lock" --editable "$target"
  fi
  touch "$stamp"
}
