"""The exceptions that end the program with one line: a user's mistake, and a run that failed."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what the user gave: printed as one line, exit code 2, no traceback.

    what: what is wrong. where: file and line, option or field. fix: how to mend it.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        if self.fix:
            text = f"{text.rstrip('.')}. {self.fix}"
        return " ".join(text.split())


class RunFailed(Exception):
    """A run that cannot go on although its input is right: printed as one line, exit code 1."""
