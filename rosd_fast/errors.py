"""Exceptions that end the program with one line: a user's mistake, or a failed run."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the user's input; it is printed as one line, without a traceback. Exit code 2.

    what: what is wrong.
    where: the file and line, option or field.
    fix: how to fix it.
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
    """A run that cannot continue although its input is right; printed as one line. Exit code 1."""
