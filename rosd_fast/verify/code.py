"""`code`: the last code block of a completion is run against tests, under bubblewrap.

The right answer is JSON text, of assertions or of inputs and outputs; `setup` runs before the code:

    {"tests": ["assert add(1, 2) == 3"], "setup": "import math"}
    {"cases": [{"stdin": "1 2\\n", "stdout": "3\\n"}]}

The score is the share of tests that pass; `select.threshold` says from which share on a completion
is a success, by default all. Outputs are equal line by line, without the space at the ends of lines
and of the text.

What can be forged: with `cases` nothing but what the program prints counts, and the outputs are
compared outside of the sandbox. An assertion runs in the process of the code that it tests, so
code written to cheat passes it: with objects that are equal to everything, or by searching the
process for the key that `sandboxed` hands out at the end of a test. To exit, to print, or to raise
and catch errors is not enough.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rosd_fast.types import Judgement
from rosd_fast.verify import sandbox
from rosd_fast.verify.here import worker_limits

INSTRUCTION = "Give the program in a Python code block: ```python ... ```"
MARKS = ("```", "code block")
OUTPUT_BYTES = 1 << 16  # at least; more where a right output is longer
TIME_SHARE = 0.8  # of the verifier's time for the tests, so that it can still report

_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """What a program must do: assertions that hold, or an output for each input."""

    setup: str
    asserts: tuple[str, ...] = ()
    stdins: tuple[str, ...] = ()
    stdouts: tuple[str, ...] = ()


def verify_code(completion: str, answer: str) -> Judgement:
    """The share of tests that pass. Raises ValueError outside of a worker that may run code."""
    limits = worker_limits()
    if limits is None or not limits.run_code:
        raise ValueError("code runs in worker processes with verify.run_code only")
    if (why := sandbox.unavailable()) is not None:
        raise ValueError(why)
    tests, program = read_tests(answer), last_code(completion)
    if tests is None:
        raise ValueError("the right answer holds no tests")
    if program is None:
        return Judgement(score=0.0, answer=None, reason="no code block")
    budget = sandbox.Budget(
        seconds=TIME_SHARE * limits.timeout_s,
        memory_bytes=limits.memory_mib << 20,
        output_bytes=max(OUTPUT_BYTES, *(2 * len(text.encode()) for text in ("", *tests.stdouts))),
    )
    try:
        reports = sandbox.run(
            program, budget, setup=tests.setup, tests=tests.asserts, stdins=tests.stdins
        )
    except sandbox.SandboxFailed as error:
        return Judgement(score=0.0, answer=program, reason=f"the sandbox failed: {error}")
    failures = [failure_of(report, tests, index) for index, report in enumerate(reports)]
    passed = failures.count(None)
    return Judgement(
        score=passed / len(failures), answer=program, reason=describe(failures, passed)
    )


def last_code(completion: str) -> str | None:
    """The text of the last closed code block; None when there is none.

    >>> last_code("First:\\n```python\\nx = 1\\n```\\nDone.")
    'x = 1\\n'
    """
    last: str | None = None
    fence, block = "", []
    for line in completion.splitlines(keepends=True):
        match = _FENCE.match(line)
        if not fence:
            if match is not None:
                fence, block = match[1], []
        elif match is not None and match[1].startswith(fence) and not match[2].strip():
            fence, last = "", "".join(block)
        else:
            block.append(line)
    return last


def read_tests(answer: str) -> Suite | None:
    """The tests of a right answer; None when it is not one."""
    try:
        value: Any = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    setup, asserts, cases = (value.get(name) for name in ("setup", "tests", "cases"))
    setup = "" if setup is None else setup
    if not isinstance(setup, str) or bool(asserts) == bool(cases):
        return None
    if asserts:
        return Suite(setup=setup, asserts=tuple(asserts)) if _texts(asserts) else None
    if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
        return None
    stdins = [case.get("stdin", "") for case in cases]
    stdouts = [case.get("stdout") for case in cases]
    if not _texts(stdins) or not _texts(stdouts):
        return None
    return Suite(setup=setup, stdins=tuple(stdins), stdouts=tuple(stdouts))


def is_tests(answer: str) -> bool:
    """Whether the right answer holds tests."""
    return read_tests(answer) is not None


def failure_of(report: dict[str, Any], tests: Suite, index: int) -> str | None:
    """Why a test failed; None: it passed."""
    if not report["passed"]:
        return report["reason"]
    if tests.stdouts and lines_of(report["stdout"]) != lines_of(tests.stdouts[index]):
        return "wrong output"
    return None


def lines_of(text: str) -> list[str]:
    """The lines without the space at their ends, and without empty ones at the end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def describe(failures: Sequence[str | None], passed: int) -> str | None:
    """How many tests passed, and why the first other one did not; None when all did."""
    for number, failure in enumerate(failures, start=1):
        if failure is not None:
            return f"{passed} of {len(failures)} tests passed; test {number}: {failure}"
    return None


def _texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)
