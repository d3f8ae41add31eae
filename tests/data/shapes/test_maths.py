"""GSM8K, MATH and AIME."""

from __future__ import annotations

from typing import Any

import pytest

from tests.data.shapes.reading import error_of, read_all, read_one

MATH = {
    "problem": "What is 1/2 of 1?",
    "level": "Level 1",
    "type": "Counting & Probability",
    "solution": r"It is $\boxed{\frac12}$.",
}


def test_gsm8k() -> None:
    row = {"question": "2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 1,234"}
    name, problem = read_one(row)
    assert (name, problem.answer, problem.verifier) == ("gsm8k", "1,234", "number")
    assert (problem.reference, problem.domain, problem.id) == ("2 + 3 = 5", "here", "here:1")


def test_math() -> None:
    name, problem = read_one(MATH)
    assert (name, problem.answer, problem.verifier) == ("math", r"\frac12", "math")
    assert (problem.domain, problem.id) == ("counting_probability", "counting_probability:1")
    assert problem.reference == MATH["solution"]


@pytest.mark.parametrize(
    ("change", "answer", "reference"),
    [
        ({"answer": "0.5"}, "0.5", MATH["solution"]),
        ({"answer": r"$\boxed{3}$"}, "3", MATH["solution"]),
        ({"answer": 7}, "7", MATH["solution"]),
        ({"solution": None, "answer": r"So \boxed{4}."}, "4", r"So \boxed{4}."),
        ({"reference": "Halve it."}, r"\frac12", "Halve it."),
    ],
)
def test_math_with_an_answer(change: dict[str, Any], answer: str, reference: str) -> None:
    name, problem = read_one({**MATH, **change})
    assert (name, problem.answer, problem.reference) == ("math", answer, reference)


def test_solutions_may_lack_a_box_where_there_is_an_answer() -> None:
    rows = [
        {"problem": "Half of 1?", "answer": r"\frac12", "solution": ""},
        {"problem": "2 + 3?", "answer": "5", "solution": "It is 5."},
        {"problem": "1000 + 1?", "answer": 1001, "solution": None},
    ]
    name, problems = read_all(*rows)
    assert name == "solved" and [p.answer for p in problems] == [r"\frac12", "5", "1001"]
    assert {p.verifier for p in problems} == {"math"}
    assert [p.reference for p in problems] == [None, "It is 5.", None]


def test_labels_of_math_that_are_no_text_are_not_domains() -> None:
    assert read_one({**MATH, "type": ["Algebra"]})[1].domain == "here"
    assert read_one({**MATH, "type": None, "subject": "Number Theory"})[1].domain == "number_theory"
    assert read_one({**MATH, "domain": "mine"})[1].domain == "mine"
    assert read_one({**MATH, "domain": "mine"}, domain="option")[1].domain == "option"


def test_a_solution_without_a_box_is_named() -> None:
    text = error_of(MATH, {**MATH, "solution": r"It is \boxed{1."})
    assert text.startswith(r'data.jsonl:2: the field "solution" has no \boxed{} that is closed')
    assert error_of(MATH, {"problem": "x"}).startswith('data.jsonl:2: the field "solution" is mis')


def test_aime() -> None:
    name, problem = read_one({"ID": "2024-I-4", "Problem": "Find m+n.", "Answer": "033"})
    assert (name, problem.id, problem.answer) == ("aime", "2024-I-4", "33")
    assert problem.verifier == "math" and problem.prompt == "Find m+n."
    name, problem = read_one({"problem": "Find m+n.", "answer": 0, "solution": "It is nothing."})
    assert (name, problem.answer, problem.reference) == ("aime", "0", "It is nothing.")
    boxed = {"Problem": "Find m+n.", "Answer": 33, "Solution": r"It is $\boxed{033}$."}
    name, problem = read_one(boxed)
    assert (name, problem.answer, problem.reference) == ("aime", "33", boxed["Solution"])


@pytest.mark.parametrize("change", [{"answer": 1000}, {"answer": -1}, {"verifier": "exact"}])
def test_rows_that_aime_does_not_have(change: dict[str, Any]) -> None:
    rows = [{"problem": "a?", "answer": 1}] * 3
    assert read_all(*rows)[0] == "aime"
    assert read_all(*rows, {**rows[0], **change}, verifier="number")[0] == "own"
