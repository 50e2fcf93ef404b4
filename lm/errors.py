"""The one exception a user's mistake raises.

`lm.cli` prints it as a single line and exits with status 2; nothing above shows a traceback for it.
"""

import importlib
from types import ModuleType


class UserError(Exception):
    """A mistake in what the user asked for: a setting, a file, a mesh.

    The message is one line: the value found, what is allowed, and what to do. Raise it beside the
    setting it guards, before anything is written.
    """


def check(condition: object, message: str) -> None:
    """Raises `UserError(message)` unless `condition` is true."""
    if not condition:
        raise UserError(message)


def require(package: str, *, extra: str, need: str) -> ModuleType:
    """Imports an optional package.

    Args:
      package: its import name, such as "jieba" or "lxml.html".
      extra: the extra of this project that installs it.
      need: what needs it, to begin the message with, such as "tokenizer.kind 'jieba'".

    Raises:
      UserError: if it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != package.split(".")[0]:
            raise  # it is there, and lacks something itself
        raise UserError(f"{need} needs the package {package}; install it with `pip install -e '.[{extra}]'`") from None
