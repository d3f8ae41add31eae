"""Problems that are answered with code."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.data.shapes.reading import error_of, read_one

MBPP: dict[str, Any] = {
    "task_id": 601,
    "text": "Write a function to add one.",
    "code": "def inc(x):\n    return x + 1",
    "test_list": ["assert inc(1) == 2", "assert inc(-1) == 0"],
    "test_setup_code": "",
    "challenge_test_list": [],
}
HEAD = 'from typing import List\n\n\ndef total(x: List[int]) -> int:\n    """Add them."""\n'
HUMANEVAL: dict[str, Any] = {
    "task_id": "HumanEval/0",
    "prompt": HEAD,
    "entry_point": "total",
    "canonical_solution": "    return sum(x)\n",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n",
}
CASES = {"cases": [{"stdin": "1\n", "stdout": "2\n"}]}


def test_mbpp() -> None:
    name, problem = read_one(MBPP)
    assert (name, problem.id, problem.verifier) == ("mbpp", "here:601", "code")
    assert problem.prompt == (
        "Write a function to add one.\n\nYour code must pass these tests:\n\n"
        "assert inc(1) == 2\nassert inc(-1) == 0"
    )
    assert json.loads(problem.answer) == {"tests": MBPP["test_list"], "setup": ""}
    assert problem.reference == "```python\ndef inc(x):\n    return x + 1\n```"


def test_sanitized_mbpp_has_imports() -> None:
    row = {**MBPP, "prompt": MBPP["text"], "text": None, "test_imports": ["import math"]}
    assert json.loads(read_one(row)[1].answer)["setup"] == "import math"
    row = {**MBPP, "test_setup_code": "root = 1"}
    assert json.loads(read_one(row)[1].answer)["setup"] == "root = 1"


def test_the_reference_solution_of_humaneval_passes_its_tests() -> None:
    name, problem = read_one(HUMANEVAL)
    assert (name, problem.id, problem.verifier) == ("humaneval", "HumanEval/0", "code")
    assert problem.prompt == f"Complete this Python function.\n\n{HEAD.strip()}"
    answer = json.loads(problem.answer)
    assert answer["setup"] == "from typing import List"
    assert problem.reference is not None
    solution = problem.reference.removeprefix("```python").removesuffix("```")
    names: dict[str, Any] = {}
    exec("\n".join([answer["setup"], solution, *answer["tests"]]), names)
    with pytest.raises(AssertionError):
        exec("\n".join(["def total(x): return 0", *answer["tests"]]), {})


@pytest.mark.parametrize(
    ("columns", "answer"),
    [
        ({"tests": ["assert f()"]}, {"tests": ["assert f()"], "setup": ""}),
        ({"tests": "assert f()", "setup": "a = 1"}, {"tests": ["assert f()"], "setup": "a = 1"}),
        ({"tests": '["assert f()"]'}, {"tests": ["assert f()"], "setup": ""}),
        ({"tests": {"tests": ["assert f()"]}}, {"tests": ["assert f()"], "setup": ""}),
        ({"tests": CASES["cases"]}, CASES),
        ({"tests": CASES}, CASES),
        ({"tests": [{"input": "1\n", "output": "2\n"}]}, CASES),
        ({"tests": '{"inputs": ["1\\n"], "outputs": ["2\\n"]}'}, CASES),
    ],
)
def test_own_tests(columns: dict[str, Any], answer: dict[str, Any]) -> None:
    name, problem = read_one({"prompt": "Write f.", "code": "def f(): ...", **columns})
    assert (name, problem.verifier, problem.prompt) == ("code", "code", "Write f.")
    assert json.loads(problem.answer) == answer
    assert problem.reference == "```python\ndef f(): ...\n```"


@pytest.mark.parametrize(
    ("row", "change", "message"),
    [
        (MBPP, {"test_list": []}, '"test_list" is not a list of texts'),
        (MBPP, {"test_list": ["assert 1", 2]}, '"test_list" is not a list of texts'),
        (MBPP, {"test_list": "assert 1"}, '"test_list" is not a list of texts'),
        (MBPP, {"test_list": ["\ud800"]}, "surrogate"),
        (MBPP, {"text": None}, '"text" is null'),
        (HUMANEVAL, {"entry_point": "sum"}, "does not begin a function sum"),
        (HUMANEVAL, {"test": " "}, '"test" is empty'),
        ({"prompt": "x", "tests": CASES}, {"tests": []}, "has neither assertions nor cases"),
        ({"prompt": "x", "tests": CASES}, {"tests": None}, "has neither assertions nor cases"),
        ({"prompt": "x", "tests": CASES}, {"tests": [{"stdin": 1}]}, "case without a text stdin"),
        ({"prompt": "x", "tests": CASES}, {"tests": [{"stdin": ""}]}, "case without a text stdout"),
        ({"prompt": "x", "tests": CASES}, {"tests": {"tests": [1]}}, "no list of assertions"),
        ({"prompt": "x", "tests": CASES}, {"tests": {"fn_name": "f"}}, "calls a function by its"),
    ],
)
def test_bad_tests_are_named(row: dict[str, Any], change: dict[str, Any], message: str) -> None:
    text = error_of(row, row, {**row, **change})
    assert text.startswith("data.jsonl:3: ") and message in text
