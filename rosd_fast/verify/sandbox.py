"""Run a model's code under bubblewrap: without network, home, and everything else of this machine.

What a program finds there: a read-only system (`/usr` and the Python that runs it), an empty `/tmp`
of 64 MiB, nothing else. It has no network, sees no process but its own, starts none, and dies with
the worker. `sandboxed` runs inside, and sets the limits of each test.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rosd_fast.verify.sandboxed import MACHINES

RUNNER = Path(__file__).with_name("sandboxed.py")
SYSTEM = ("/bin", "/sbin", "/lib", "/lib32", "/lib64")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
FILES = ("/etc/ld.so.cache", "/etc/localtime")
TMP_BYTES = 64 << 20
INSTALL = "Install bubblewrap (apt-get install bubblewrap), or use another verifier"
PR_SET_CHILD_SUBREAPER = 36
START_S = 4.0  # for the sandbox, beside what the code may take; a busy machine is slow to start it


class SandboxFailed(Exception):
    """The sandbox did not report on all tests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What all tests of a program may use together. output_bytes: of each test."""

    seconds: float
    memory_bytes: int
    output_bytes: int = 1 << 16


def unavailable() -> str | None:
    """Why code cannot be run here; None: it can. Tried once per process."""
    return _tried()


@cache
def _tried() -> str | None:
    if platform.system() != "Linux":
        return "bubblewrap needs Linux"
    if platform.machine() not in MACHINES:
        return f"there is no filter of system calls for {platform.machine()}"
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed"
    budget = Budget(seconds=10.0, memory_bytes=1 << 30)
    try:
        (report,) = run("x = 1", budget, tests=["assert x == 1"])
    except SandboxFailed as error:
        return f"bubblewrap does not work here ({error})"
    return None if report["passed"] else f"code does not run under bubblewrap ({report['reason']})"


def run(
    program: str,
    budget: Budget,
    *,
    setup: str = "",
    tests: Sequence[str] = (),
    stdins: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """The report of `sandboxed` on each test, or on each input. Raises SandboxFailed."""
    job: dict[str, Any] = {
        "program": program,
        "setup": setup,
        "limits": {
            "seconds": budget.seconds,
            "memory_bytes": budget.memory_bytes,
            "output_bytes": budget.output_bytes,
        },
    }
    job |= {"tests": [*tests]} if tests else {"stdins": [*stdins]}
    number = len(tests or stdins)
    reports, errors = _start(job, budget, most=number * (6 * budget.output_bytes + 4096))
    lines = reports.decode(errors="replace").split("\n")
    if len(lines) - 1 < number:
        what = errors.decode(errors="replace").strip().split("\n")[-1]
        raise SandboxFailed(what or "it ended before all tests had run")
    return [json.loads(line) for line in lines[:number]]


def adopt() -> None:
    """Make this process the parent of what its children leave behind, for `reap`.

    bubblewrap does not wait for the process that it starts. That would be left to process 1, which
    in a container is often a program that reaps nothing: one dead entry per completion.
    """
    if platform.system() == "Linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap() -> None:
    """Forget dead sandboxes that `adopt` left to this process; other children are left alone."""
    with contextlib.suppress(OSError):  # no child, or none that it may ask for
        while (child := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if Path(f"/proc/{child.si_pid}/comm").read_text().strip() != "bwrap":
                return
            os.waitpid(child.si_pid, 0)


def command() -> list[str]:
    """How bubblewrap is called; the runner's text is its last argument."""
    python = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    parts = [
        shutil.which("bwrap") or "bwrap",
        "--unshare-all",
        "--die-with-parent",
        "--new-session",
        "--clearenv",
    ]
    parts += ["--uid", "65534", "--gid", "65534", "--hostname", "sandbox", "--cap-drop", "ALL"]
    parts += ["--setenv", "PATH", "/usr/bin:/bin", "--setenv", "HOME", "/tmp"]
    parts += ["--setenv", "LANG", "C.UTF-8", "--ro-bind", "/usr", "/usr"]
    for name in SYSTEM:
        if Path(name).is_symlink():
            parts += ["--symlink", str(Path(name).readlink()), name]
        elif Path(name).is_dir():
            parts += ["--ro-bind", name, name]
    for prefix in {sys.base_prefix, sys.base_exec_prefix, str(python.parent.parent)}:
        if not Path(prefix).is_relative_to("/usr"):
            parts += ["--ro-bind", prefix, prefix]
    for name in FILES:
        parts += ["--ro-bind-try", name, name]
    for name in DEVICES:
        parts += ["--dev-bind", name, name]
    parts += ["--size", str(TMP_BYTES), "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/"]
    return [*parts, str(python), "-I", "-S", "-c", RUNNER.read_text()]


def _start(job: dict[str, Any], budget: Budget, *, most: int) -> tuple[bytes, bytes]:
    """What the sandbox writes to standard output and error, as far as it comes and fits."""
    text = os.memfd_create("job")
    with os.fdopen(text, "wb", closefd=False) as file:
        file.write(json.dumps(job).encode())
    os.lseek(text, 0, os.SEEK_SET)
    process = subprocess.Popen(
        command(), stdin=text, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={}
    )
    os.close(text)
    deadline = time.monotonic() + budget.seconds + START_S
    assert process.stdout is not None and process.stderr is not None
    found = {process.stdout.fileno(): b"", process.stderr.fileno(): b""}
    left = set(found)
    try:
        while left and sum(map(len, found.values())) < most:
            ready, _, _ = select.select(left, [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for descriptor in ready:
                part = os.read(descriptor, 1 << 16)
                found[descriptor] += part
                if not part:
                    left.remove(descriptor)
    finally:
        process.kill()
        process.wait()
        reap()
        names = (process.stdout, process.stderr)
        output, errors = (found[pipe.fileno()] for pipe in names)
        for pipe in names:
            pipe.close()
    return output, errors
