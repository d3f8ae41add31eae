"""The program that runs a model's code inside of the sandbox; `sandbox` starts it.

It is given as text to a bare Python, so it imports the standard library alone. It reads one job
from standard input and writes one report per test to standard output, as lines of JSON:

    {"program": "...", "setup": "...", "tests": ["assert ..."], "limits": {...}}
    {"program": "...", "setup": "...", "stdins": ["1 2\\n"], "limits": {...}}
    -> {"passed": true} or {"passed": false, "reason": "..."} or {"stdout": "..."}

Each test runs in a process of its own that can start no other, with limits of time, memory, files
and output. It shows that it came to its end by a random key, which the process can read only there:
to leave early, whatever the exit code, or to print something is not to pass.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import random
import resource
import select
import signal
import struct
import sys
import time
from typing import Any, NoReturn

MAX_REASON = 300
FILE_BYTES = 16 << 20
MAX_THREADS = 64

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
ALLOW, DENY, UNKNOWN, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000  # EPERM, ENOSYS
CLONE_THREAD = 0x10000
# Machine -> its audit number, clone, clone3, and calls that are denied: other processes (fork,
# vfork, ptrace, process_vm_readv, process_vm_writev, pidfd_open, pidfd_getfd), namespaces (unshare,
# setns, mount), and parts of the kernel that no exercise needs (keys, bpf, perf, userfaultfd,
# io_uring).
MACHINES = {
    "x86_64": (
        *(0xC000003E, 56, 435),
        (57, 58, 101, 310, 311, 434, 438, 272, 308, 165, 248, 249, 250, 321, 298, 323, 425),
    ),
    "aarch64": (
        *(0xC00000B7, 220, 435),
        (117, 270, 271, 434, 438, 97, 268, 40, 217, 218, 219, 280, 241, 282, 425),
    ),
}


def main() -> None:
    job = json.loads(sys.stdin.buffer.read())
    reports = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    limits = job["limits"]
    end = time.monotonic() + limits["seconds"]
    tests = job.get("tests") or job["stdins"]
    for test in tests:
        share = max(1.0, limits["seconds"] / len(tests))
        deadline = min(end, time.monotonic() + share)
        report = run(job, test, deadline)
        os.write(reports, json.dumps(report).encode() + b"\n")


def run(job: dict[str, Any], test: str, deadline: float) -> dict[str, Any]:
    """Run the program with one test in a process of its own; what came of it."""
    limits = job["limits"]
    key_out, key_in = os.pipe()
    end_out, end_in = os.pipe()
    text_out, text_in = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            behave(job, test, key_out, end_in, text_in)
        finally:
            os._exit(1)
    for descriptor in (key_out, end_in, text_in):
        os.close(descriptor)
    key = os.urandom(16).hex().encode()  # after the fork: the child has no copy of it
    os.write(key_in, key)
    os.close(key_in)
    try:
        found = collect({end_out: 4096, text_out: limits["output_bytes"]}, deadline)
    finally:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(end_out)
        os.close(text_out)
    if isinstance(found, str):
        return {"passed": False, "reason": found}
    if found[end_out] == key:
        return {"passed": True, "stdout": found[text_out].decode(errors="replace")}
    reason = found[end_out].decode(errors="replace")
    return {"passed": False, "reason": reason or why_ended(status)}


def collect(most: dict[int, int], deadline: float) -> dict[int, bytes] | str:
    """What is written into pipes until all are closed, or why that did not end well.

    most: number of bytes per pipe.
    """
    found = dict.fromkeys(most, b"")
    left = set(most)
    while left:
        ready, _, _ = select.select(left, [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return "timed out"
        for descriptor in ready:
            part = os.read(descriptor, 65536)
            found[descriptor] += part
            if len(found[descriptor]) > most[descriptor]:
                return f"printed more than {most[descriptor]:,} bytes"
            if not part:
                left.remove(descriptor)
    return found


def why_ended(status: int) -> str:
    """Why a process ended that did not come to its end."""
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGKILL:
        if os.WTERMSIG(status) == signal.SIGXCPU:
            return "timed out"
        return f"died ({signal.Signals(os.WTERMSIG(status)).name})"
    if os.WIFEXITED(status):
        return f"ended early, with exit code {os.WEXITSTATUS(status)}"
    return "was killed, out of memory?"


def behave(job: dict[str, Any], test: str, key_out: int, end_in: int, text_in: int) -> NoReturn:
    """In the child: give up what it does not need, run the code, say that it came to its end."""
    own = random.SystemRandom().sample(range(100, 900), 2)  # where they are is not to be guessed
    os.dup2(key_out, own[0], inheritable=False)
    os.dup2(end_in, own[1], inheritable=False)
    cases = "stdins" in job
    if cases:
        stdin = os.memfd_create("stdin")
        os.write(stdin, test.encode(errors="replace"))
        os.lseek(stdin, 0, os.SEEK_SET)
        os.dup2(stdin, 0)
        os.dup2(text_in, 1)
    low, high = sorted(own)
    os.closerange(3, low)
    os.closerange(low + 1, high)
    os.closerange(high + 1, 4096)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.argv = ["program.py"]
    limits = job["limits"]
    limit(limits["seconds"], limits["memory_bytes"])
    forbid_processes()
    texts = [job["setup"], job["program"]] if cases else [job["setup"], job["program"], test]
    problem = execute(texts, exits=cases)
    sys.stdout.flush()
    os.write(own[1], os.read(own[0], 99) if problem is None else problem.encode(errors="replace"))
    os._exit(0)


def execute(texts: list[str], *, exits: bool) -> str | None:
    """Run texts one after the other in one namespace; why they failed, None: they did not.

    exits: whether the program may end itself without an error.
    """
    names: dict[str, Any] = {"__name__": "__main__", "exit": sys.exit, "quit": sys.exit}
    try:
        for text in texts:
            exec(compile(text, "program.py", "exec"), names)
    except SystemExit as error:
        if exits and error.code in (None, 0):
            return None
        return "ended early, by sys.exit"
    except MemoryError:
        return "ran out of memory"
    except BaseException as error:
        message = " ".join(str(error).split())
        name = type(error).__name__
        return (f"{name}: {message}" if message else name)[:MAX_REASON]
    return None


def limit(seconds: float, memory_bytes: int) -> None:
    """Set the limits of this process and of its threads."""
    for kind, value in (
        (resource.RLIMIT_CPU, int(seconds) + 1),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, MAX_THREADS),
    ):
        resource.setrlimit(kind, (value, value))


def forbid_processes() -> None:
    """Install a filter of system calls (seccomp): threads are allowed, other processes are not.

    RLIMIT_NPROC alone does not hold for root.
    """
    audit, clone, clone3, denied = MACHINES[platform.machine()]
    load, equal, at_least, any_bit, end = 0x20, 0x15, 0x35, 0x45, 0x06
    program = [(load, 0, 0, 4), (equal, 1, 0, audit), (end, 0, 0, KILL), (load, 0, 0, 0)]
    program += [(at_least, 0, 1, 0x40000000), (end, 0, 0, DENY)]  # another ABI
    program += [(equal, 0, 1, clone3), (end, 0, 0, UNKNOWN)]  # the C library then calls clone
    for number in denied:
        program += [(equal, 0, 1, number), (end, 0, 0, DENY)]
    program += [(equal, 0, 3, clone), (load, 0, 0, 16), (any_bit, 1, 0, CLONE_THREAD)]
    program += [(end, 0, 0, DENY), (end, 0, 0, ALLOW)]
    filters = b"".join(struct.pack("HBBI", *step) for step in program)
    buffer = ctypes.create_string_buffer(filters)
    about = struct.pack("HL", len(program), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if done or libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.c_char_p(about), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp is not available")


if __name__ == "__main__":
    main()
