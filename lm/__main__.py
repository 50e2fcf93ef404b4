"""`python -m lm COMMAND` is `lm COMMAND`."""

from lm.cli import entry

raise SystemExit(entry())
