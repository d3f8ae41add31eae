"""Problems that are answered with code: MBPP, HumanEval, and own rows with tests.

The answer is JSON text for the verifier `code`:

    {"tests": ["assert add(1, 2) == 3"], "setup": "import math"}
    {"cases": [{"stdin": "1 2\\n", "stdout": "3\\n"}]}

`setup` runs before the code under test.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rosd_fast.data.fields import check_text
from rosd_fast.data.shapes.row import Row
from rosd_fast.data.shapes.shape import PROMPTS, Fields

INPUTS = ("stdin", "input")
OUTPUTS = ("stdout", "output")


def is_mbpp(row: Row) -> bool:
    """Whether there is a list of assertions, `test_list`."""
    return row.has_text(*PROMPTS, "text") and bool(row.parsed_or_none("test_list"))


def read_mbpp(row: Row) -> Fields:
    """The assertions follow the task: they alone name the function that is asked for."""
    tests = _texts(row, "test_list")
    setup = row.text("test_setup_code")
    if row.value("test_imports"):
        setup = "\n".join([*_texts(row, "test_imports"), setup]).rstrip()
    task = row.text(row.first(*PROMPTS, "text") or "text", required=True).rstrip()
    return Fields(
        prompt="\n".join([task, "", "Your code must pass these tests:", "", *tests]),
        answer=json.dumps({"tests": tests, "setup": setup}),
        verifier="code",
        id=row.value("task_id"),
        reference=fenced(row.text("code")),
    )


def is_humaneval(row: Row) -> bool:
    """Whether there is a function's head, and tests of it by its name."""
    return row.has_text("prompt") and all(
        isinstance(row.value(name), str) for name in ("test", "entry_point")
    )


def read_humaneval(row: Row) -> Fields:
    """What precedes the function in the prompt, imports and helpers, runs before the code."""
    head, name = row.text("prompt", required=True), row.text("entry_point", required=True)
    before, found, _ = head.rpartition(f"def {name}(")
    if not found:
        raise row.error("prompt", f"does not begin a function {name}")
    test = f"{row.text('test', required=True).rstrip()}\n\ncheck({name})"
    body = row.text("canonical_solution")
    return Fields(
        prompt=f"Complete this Python function.\n\n{head.strip()}",
        answer=json.dumps({"tests": [test], "setup": before.strip()}),
        verifier="code",
        id=row.value("task_id"),
        reference=fenced(head + body if body else ""),
    )


def is_code(row: Row) -> bool:
    """Whether a problem comes with `tests`: assertions, or inputs and outputs."""
    tests = row.parsed_or_none("tests")
    asserts = isinstance(tests, str) and "assert" in tests
    return row.has_text(*PROMPTS) and (asserts or (isinstance(tests, list | dict) and bool(tests)))


def read_code(row: Row) -> Fields:
    """`tests` as assertions or as inputs and outputs; `setup` runs before the code."""
    tests = row.parsed("tests")
    if isinstance(tests, str):
        tests = [row.text("tests", required=True)]
    if tests and isinstance(tests, list) and all(isinstance(test, str) for test in tests):
        tests = {"tests": tests, "setup": row.text("setup")}
    return Fields(
        prompt=row.text(row.first(*PROMPTS) or PROMPTS[0], required=True),
        answer=cases_of(row, "tests", tests),
        verifier="code",
        reference=fenced(row.text("code")) or row.text("solution") or None,
    )


def is_cases(value: Any) -> bool:
    """Whether it is an object with tests or with inputs and outputs, or a list of objects with an
    input and an output each, or JSON text of that."""
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return False
    if isinstance(value, list):
        pairs = [isinstance(each, Mapping) and bool(each.keys() & {*OUTPUTS}) for each in value]
        return bool(pairs) and all(pairs)
    return isinstance(value, Mapping) and bool(
        value.keys() & {"tests", "cases", "inputs", "input", "fn_name"}
    )


def cases_of(row: Row, name: str, value: Any) -> str:
    """The answer for the verifier `code`: of a list of inputs and outputs, or an object."""
    if isinstance(value, str):
        value = json.loads(value)
    if isinstance(value, Mapping) and value.get("fn_name"):
        raise row.error(
            name, "calls a function by its name", fix='Write assertions: {"tests": ["assert ..."]}'
        )
    if isinstance(value, Mapping) and "tests" in value:
        tests, setup = value["tests"], value.get("setup") or ""
        if not isinstance(tests, list) or not tests or not all(_is_code(t) for t in [*tests, "x"]):
            raise row.error(name, "has no list of assertions")
        if not isinstance(setup, str):
            raise row.error(name, "has a setup that is no text")
        checked = [check_text(test, row.shown(name), row.where) for test in tests]
        return json.dumps({"tests": checked, "setup": setup})
    return json.dumps({"cases": [_case(row, name, case) for case in _pairs(row, name, value)]})


def _pairs(row: Row, name: str, value: Any) -> list[Any]:
    """A list of cases: `value` itself, its `cases`, or its lists of inputs and outputs, paired."""
    if isinstance(value, Mapping):
        inputs, outputs = value.get("inputs"), value.get("outputs")
        if isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs):
            value = [{"stdin": i, "stdout": o} for i, o in zip(inputs, outputs, strict=True)]
        else:
            value = value.get("cases")
    if not isinstance(value, list) or not value:
        raise row.error(
            name,
            "has neither assertions nor cases",
            fix='Write ["assert f(1) == 2"], or [{"stdin": "1", "stdout": "2"}]',
        )
    return value


def _case(row: Row, name: str, case: Any) -> dict[str, str]:
    """One input and what must be printed for it."""
    if _is_object(case) and case.get("testtype") == "functional":  # of LiveCodeBench
        raise row.error(
            name, "calls a function by its name", fix='Write assertions: {"tests": ["assert ..."]}'
        )
    found = []
    for names in (INPUTS, OUTPUTS):
        value = next((case[n] for n in names if n in case), None) if _is_object(case) else None
        if not isinstance(value, str):
            raise row.error(name, f"has a case without a text {names[0]}")
        found.append(check_text(value, row.shown(name), row.where))
    return {"stdin": found[0], "stdout": found[1]}


def _texts(row: Row, name: str) -> list[str]:
    """A column of texts, none of them blank."""
    value = row.parsed(name)
    if not isinstance(value, list) or not value or not all(_is_code(text) for text in value):
        raise row.error(name, "is not a list of texts")
    return [check_text(text, row.shown(name), row.where) for text in value]


def fenced(code: str) -> str | None:
    """The code as a solution that the verifier accepts; None for none."""
    return f"```python\n{code.strip()}\n```" if code.strip() else None


def _is_code(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)
