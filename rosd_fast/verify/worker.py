"""A worker process: reads tasks from standard input, judges one after the other, writes answers.

    python -P -m rosd_fast.verify.worker '{"timeout_s": 10, ...}'

It imports neither torch nor transformers unless a user's file does. It ignores Ctrl-C, which is for
the trainer, and ends when its standard input closes, with everything that it started: then the
trainer has closed it, or was killed. What verifiers print goes nowhere.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import select
import signal
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rosd_fast.errors import UserError
from rosd_fast.verify import sandbox
from rosd_fast.verify.here import enter_worker
from rosd_fast.verify.origin import Origin, describe, load_function
from rosd_fast.verify.protocol import Limits, Outcome, done_line, failed, line
from rosd_fast.verify.registry import VerifierFunction, as_judgement
from rosd_fast.verify.user_file import Example, description_of, example_of

GRACE_S = 5.0  # after the time limit, in which the trainer ends a worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A verifier that this process can call."""

    function: VerifierFunction
    example: Example


def main() -> None:
    limits = Limits(**json.loads(sys.argv[1]))
    enter_worker(limits)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limits.run_code:
        sandbox.adopt()
    tasks, answers = take_streams()
    threading.Thread(target=end_with, args=(tasks.fileno(),), daemon=True).start()
    send = answers.write
    send(line("ready"))
    answers.flush()
    silence_errors()
    serve(tasks, answers, limits)


def take_streams() -> tuple[BinaryIO, BinaryIO]:
    """The pipes from and to the trainer, out of the reach of `print` and `input`."""
    tasks, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    return tasks, answers


def silence_errors() -> None:
    """From here on standard error goes nowhere; before, the trainer reads why a start failed."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def end_with(pipe: int) -> None:
    """Wait until nobody can write into the pipe any more, then end this process and its children.

    The trainer starts each worker in a process group of its own.
    """
    poll = select.poll()
    poll.register(pipe, 0)
    while not any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll()):
        pass
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def serve(tasks: BinaryIO, answers: BinaryIO, limits: Limits) -> None:
    """Do what each line says, until there are no more."""
    loaded: dict[str, Loaded] = {}
    limit_memory(limits.memory_mib)
    for text in tasks:
        message = json.loads(text)
        name, last = message["name"], False
        if message["kind"] == "load":
            answers.write(line("begun", name=name))
            answers.flush()
            answers.write(load(name, message, loaded))
            limit_memory(limits.memory_mib)
        else:
            try:
                outcome = judge(loaded.get(name), message, limits.timeout_s)
            except MemoryError:  # nothing in this process can be relied on any more
                reason = f"the verifier ran out of memory (verify.memory_mib {limits.memory_mib})"
                outcome, last = failed("died", reason), True
            answers.write(done_line(outcome, last=last))
        answers.flush()
        if last:
            return


def load(name: str, message: dict[str, Any], loaded: dict[str, Loaded]) -> bytes:
    """Import a verifier into `loaded`; the line that says so, or what is wrong with it."""
    limit_memory(None)
    origin = Origin(**message["origin"])
    try:
        for package in message["requires"]:
            importlib.import_module(package)
        function, module = load_function(origin)
        description = description_of(function, module, origin)
    except ImportError as error:
        return line("broken", what=describe(error), where="", fix="")
    except UserError as error:
        return line("broken", what=error.what, where=error.where, fix=error.fix)
    loaded[name] = Loaded(function=function, example=example_of(function, module))
    return line("loaded", description=asdict(description))


def judge(verifier: Loaded | None, message: dict[str, Any], timeout_s: float) -> Outcome:
    """Call the verifier; whatever it raises is an outcome, except MemoryError."""
    completion, answer = message["completion"], message["answer"]
    if verifier is None or answer is None:
        return failed("failed", "the verifier cannot be loaded")
    # A last resort for a worker whose trainer is gone. It works without Python's help, since a
    # verifier may hold the interpreter's lock.
    signal.setitimer(signal.ITIMER_REAL, timeout_s + GRACE_S)
    try:
        if completion is None:
            completion = perfect(verifier.example, answer)
        value = verifier.function(completion, answer)
    except MemoryError:
        raise
    except BaseException as error:
        return failed("failed", f"the verifier raised {describe(error)}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        return Outcome(judgement=as_judgement(value, completion))
    except (TypeError, ValueError) as error:
        return failed("failed", " ".join(str(error).split()))
    except MemoryError:
        raise
    except Exception as error:  # a whole number too large for a float, an answer that is no text
        return failed("failed", f"what the verifier returned raises {describe(error)}")


def perfect(example: Example, answer: str) -> str:
    """A completion that is right, by the example that the verifier's file gives."""
    if example is None:
        raise ValueError("the verifier gives no example")
    return str(example(answer)) if callable(example) else example.replace("{answer}", answer)


def limit_memory(memory_mib: int | None) -> None:
    """Let the process take that much more address space than it has now; None: no limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = hard
    if memory_mib is not None:
        soft = address_space() + memory_mib * 2**20
        soft = soft if hard == resource.RLIM_INFINITY else min(soft, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    except (ValueError, OSError):  # a system without this limit
        return


def address_space() -> int:
    """Bytes of address space that this process has; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return 0
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main()
