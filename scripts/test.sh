#!/usr/bin/env bash
# Everything that must hold before a change lands: format, lint, types, tests. From nothing; fast the second time.
#
#   bash scripts/test.sh                   the fast suite
#   bash scripts/test.sh --parity          with torch, step for step against transformers (CI does this)
#   bash scripts/test.sh -- -m slow        any pytest options after --
source "$(dirname "$0")/common.sh"

extras="test"
[ -n "${CI:-}" ] && extras=test,parity
if [ "${1:-}" = --parity ]; then
  extras=test,parity
  shift
fi
[ "${1:-}" = -- ] && shift

set_up $extras
# Where torch was asked for, a skip of a parity test is a failure.
if [ $extras = test,parity ]; then export LM_PARITY=1; fi

.venv/bin/ruff check .
.venv/bin/ruff format --check --quiet .
.venv/bin/mypy
.venv/bin/pytest -n "$(nproc 2>/dev/null || sysctl -n hw.ncpu)" "$@"
