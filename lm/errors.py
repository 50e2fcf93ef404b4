"""The one exception a user's mistake raises.

`lm.cli` prints it as a single line and exits with status 2; nothing above shows a traceback for it.
"""


class UserError(Exception):
    """A mistake in what the user asked for: a setting, a file, a mesh.

    The message is one line: the value found, what is allowed, and what to do. Raise it beside the
    setting it guards, before anything is written.
    """


def check(condition: object, message: str) -> None:
    """Raises `UserError(message)` unless `condition` is true."""
    if not condition:
        raise UserError(message)
