"""Run a command and end it, with all its children, when this process's standard input closes.

    python watchdog.py SECONDS COMMAND...

The process that starts a server through this script holds the other end of the pipe. That end
closes however the process ends, even by kill -9, which no handler could catch. SECONDS is how long
the command has to exit by itself. The script uses only the standard library, so that it runs from
any folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36  # orphaned grandchildren become our children, so we find them
POLL_S = 0.05


def main() -> int:
    grace_s, command = float(sys.argv[1]), sys.argv[2:]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # the trainer handles Ctrl-C
    with contextlib.suppress(OSError, AttributeError):  # not available on every system
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        return 127
    closed = threading.Event()
    threading.Thread(target=wait_for_end_of_input, args=(closed,), daemon=True).start()
    while child.poll() is None and not closed.wait(POLL_S):
        pass
    end(child, grace_s)
    return child.returncode or 0


def wait_for_end_of_input(closed: threading.Event) -> None:
    while os.read(0, 4096):
        pass
    closed.set()


def end(child: subprocess.Popen[bytes], grace_s: float) -> None:
    """Send SIGTERM to the child's group, then SIGKILL to it and to all other descendants."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and (child.poll() is None or children()):
        time.sleep(POLL_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    for _ in range(20):  # the children of killed processes become ours in turn
        left = children()
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S)


def children() -> list[int]:
    """The ids of our child processes, without zombies."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    try:
        path = Path(f"/proc/self/task/{threading.get_native_id()}/children")
        return [int(pid) for pid in path.read_text().split()]
    except OSError:
        return []


if __name__ == "__main__":
    sys.exit(main())
