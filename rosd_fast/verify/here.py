"""Whether this process is a verifier's worker, and with which limits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rosd_fast.errors import UserError
from rosd_fast.verify.origin import GUARD

if TYPE_CHECKING:
    from rosd_fast.verify.protocol import Limits

_limits: Limits | None = None


def enter_worker(limits: Limits) -> None:
    """Say that this process is a worker, from now on."""
    global _limits
    _limits = limits


def worker_limits() -> Limits | None:
    """The limits of this worker; None: this process is none."""
    return _limits


def refuse_in_worker(action: str) -> None:
    """Raise UserError in a worker: it has imported a script that does not guard its start.

    Without it each worker would train, and start workers of its own.
    """
    if _limits is not None:
        raise UserError(
            f"{action} when a worker imports the file to find a verifier",
            fix=f"Put the call under {GUARD}",
        )
