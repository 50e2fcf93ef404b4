"""`python -m lm COMMAND` is `lm COMMAND`."""

from lm.cli import main

raise SystemExit(main())
