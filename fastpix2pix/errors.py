"""The exceptions that a user's own mistake may raise."""


class UserError(Exception):
    """A mistake that the user can mend.

    ``str(error)`` is one line that names the file or value, says what is wrong with it, and gives the
    remedy. Commands print it as ``error: ...`` and exit with 2; library callers may catch it. What a
    terminal could not show of a file's name, or would obey, is escaped.
    """

    def __init__(self, message: str):
        line = " ".join(message.split())
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line))


class NotFinite(UserError):
    """A training whose losses or weights are no numbers any more: its state is not worth saving."""
