"""One process per run folder: rank 0 holds a lock on a file in it for the life of the run. The
folder of an evaluation is locked the same way.

The lock is the kernel's (`flock`), so it ends with the process however that dies; the file stays
and says nothing by itself. Child processes do not inherit the descriptor.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from rosd_fast.errors import UserError

LOCK_FILE = "run.lock"  # "PID HOST" of the process that holds it, or held it last
HOLDER = re.compile(r"(\d+) (\S+)\n")
NAMING_S = 1.0  # within which a process that has taken a lock writes its name


class RunLock:
    """The lock of one run folder, free until `take`."""

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def take(self, folder: Path, *, what: str = "run") -> None:
        """Lock the run folder until `close`. what: "run" or "evaluation", for messages.

        On a file system without locks, one line on stderr says so and the folder stays unlocked.
        Raises UserError when another process holds the lock or the folder cannot be written.
        """
        file = folder / LOCK_FILE
        try:  # Python's descriptors are closed on exec
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(
                f"the {what}'s folder cannot be written ({error.strerror})",
                where=str(file),
                fix=f"Make it writable, or start another {what} instead",
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(
                f"{holder(file)} is working on this {what}",
                where=str(folder),
                fix="Stop it first, or wait until it ends",
            ) from None
        except OSError as error:
            os.close(descriptor)
            print(
                f"{folder} is on a file system without locks ({error.strerror}): take care that no "
                f"second process resumes this {what}",
                file=sys.stderr,
            )
            return
        self._descriptor = descriptor
        with suppress(OSError):  # a full disk: the lock holds without a name
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)

    def close(self) -> None:
        """Free the folder; the file stays, as a process may be about to lock it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def holder(file: Path) -> str:
    """The process that holds a lock file, in words.

    It writes its name just after it has taken the lock. Until then, for up to `NAMING_S`, the file
    is empty or names the one before it, which has ended.
    """
    end = time.monotonic() + NAMING_S
    while time.monotonic() < end:
        match = HOLDER.fullmatch(file.read_text(errors="replace"))
        if match and _may_run(int(match[1]), match[2]):
            return f"another process (pid {match[1]} on {match[2]})"
        time.sleep(0.02)
    return "another process"


def _may_run(pid: int, host: str) -> bool:
    """Whether a process is there, as far as this host can tell."""
    if host != socket.gethostname():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True
