"""Own rows, SciKnowEval, tool use and exercises, and the columns that every shape may have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rosd_fast.types import Problem
from tests.data.shapes.reading import error_of, read_all, read_one

ROW: dict[str, Any] = {"prompt": "2 + 2 = ?", "answer": "4", "verifier": "number"}
CALL = {"Action": "getFacts", "Action_Input": '{"limit": 3}'}
SHARED = Path(__file__).parents[4] / "shared" / "data"


def test_a_full_row() -> None:
    extra = {
        "id": "first",
        "domain": "sums",
        "system": "Be brief.",
        "reference": "Count on.",
        "teacher_prompt": "You know that 2 + 2 = 4.",
        "feedback": "Count again.",
        "weight": 2,
    }
    assert read_one({**ROW, **extra}) == (
        "own",
        Problem(
            id="first",
            domain="sums",
            prompt="2 + 2 = ?",
            answer="4",
            verifier="number",
            system="Be brief.",
            reference="Count on.",
            teacher_prompt="You know that 2 + 2 = 4.",
            feedback="Count again.",
            weight=2.0,
        ),
    )


def test_missing_fields_have_defaults() -> None:
    name, problems = read_all(
        {"Problem": "1 + 1?", "answer": 2},
        {"question": "1 / 2?", "answer": 0.5, "system": None, "id": 7},
        {"question": "6 / 2?", "answer": 1e-05, "system": " ", "idx": "c", "weight": ""},
        verifier="number",
    )
    assert name == "own"
    assert [p.id for p in problems] == ["here:1", "here:7", "c"]
    assert [p.answer for p in problems] == ["2", "0.5", "0.00001"]
    assert {(p.domain, p.verifier, p.system, p.weight) for p in problems} == {
        ("here", "number", None, 1.0)
    }


def test_verifiers_go_from_the_row_over_the_option_to_the_shape() -> None:
    science = {"prompt": "Which?\n\nA: 1\nB: 2", "answer": "A", "kind": "mcq", "tests": "-"}
    name, problem = read_one(science)
    assert (name, problem.verifier) == ("sciknoweval", "choice")
    assert read_one(science, verifier="exact")[1].verifier == "exact"
    assert read_one(ROW, verifier="exact")[1].verifier == "number"


def test_a_data_set_cannot_name_code_to_run() -> None:
    named = {**ROW, "verifier": "score.py:judge"}
    assert 'the field "verifier" names a file of code' in error_of(named)
    assert "names a file of code" in error_of(named, verifier="other.py:judge")
    assert read_one(named, verifier="score.py:judge")[1].verifier == "score.py:judge"
    unnamed = {"prompt": "2 + 2 = ?", "answer": "4"}
    assert read_one(unnamed, verifier="score.py:judge")[1].verifier == "score.py:judge"


@pytest.mark.parametrize("answer", [[CALL], json.dumps([CALL, CALL])])
def test_tool_use_by_its_kind_and_by_its_answer(answer: Any) -> None:
    for kind in ({"kind": "tooluse"}, {}):
        name, problem = read_one({"prompt": "Use tools.", "answer": answer, **kind})
        assert (name, problem.verifier) == ("tooluse", "tools")
        assert json.loads(problem.answer)[0] == CALL


@pytest.mark.parametrize("answer", ["[]", "getFacts", '[{"Action"', '["Action"]', [{"action": 1}]])
def test_an_answer_that_is_no_list_of_calls(answer: Any) -> None:
    row = {"prompt": "Use tools.", "answer": answer, "kind": "tooluse"}
    assert error_of(row).startswith('data.jsonl:1: the field "answer" is not a JSON list of {"Act')


def test_own_rows_and_calls_of_tools_may_share_a_file() -> None:
    rows = [ROW, {"prompt": "Use tools.", "answer": [CALL]}]
    name, problems = read_all(*rows)
    assert (name, [p.verifier for p in problems]) == ("tooluse", ["number", "tools"])


def test_an_exercise_is_its_own_answer() -> None:
    metadata = {"source_dataset": "leg_counting", "total_legs": 4}
    row = {"question": "Legs of a cat?", "answer": "4", "metadata": metadata}
    name, problem = read_one(row)
    assert (name, problem.verifier) == ("reasoning_gym", "reasoning_gym")
    assert (problem.domain, problem.id) == ("leg_counting", "leg_counting:1")
    assert json.loads(problem.answer) == row


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"answer": "4", "verifier": "number"}, 'the field "prompt" is missing'),
        ({**ROW, "prompt": None}, 'the field "prompt" is null'),
        ({**ROW, "prompt": 5}, 'the field "prompt" is a JSON number, not a string'),
        ({**ROW, "prompt": ["x"]}, 'the field "prompt" is a JSON list, not a string'),
        ({**ROW, "prompt": " \n"}, 'the field "prompt" is empty'),
        ({**ROW, "prompt": "\ud800"}, "surrogate"),
        ({**ROW, "system": "\ud800"}, "surrogate"),
        ({"prompt": "x", "verifier": "number"}, 'the field "answer" is missing'),
        ({**ROW, "answer": ""}, 'the field "answer" is empty'),
        ({**ROW, "answer": True}, 'the field "answer" is a JSON boolean'),
        ({**ROW, "answer": {"a": 1}}, 'the field "answer" is a JSON object'),
        ({**ROW, "answer": float("nan")}, 'the field "answer" is nan, not a number'),
        ({**ROW, "answer": float("-inf")}, 'the field "answer" is -inf, not a number'),
        ({**ROW, "system": ["x"]}, "a JSON list, not a string. Correct it, or ignore the column: "),
        ({**ROW, "domain": 3}, 'the field "domain" is a JSON number'),
        ({**ROW, "reference": {}}, "data.columns.reference=''"),
        ({**ROW, "feedback": [1]}, "data.columns.feedback=''"),
        ({**ROW, "teacher_prompt": 1}, "data.columns.teacher_prompt=''"),
        ({**ROW, "id": {}}, 'the field "id" is a JSON object'),
        ({**ROW, "id": True}, 'the field "id" is a JSON boolean'),
        ({**ROW, "id": " "}, 'the field "id" is empty'),
        ({**ROW, "weight": "heavy"}, "\"weight\" is 'heavy', not a number"),
        ({**ROW, "weight": -1}, 'the field "weight" is -1. It'),
        ({**ROW, "weight": float("nan")}, "give a number from 0 to 1000"),
        ({**ROW, "weight": 1e308}, "give a number from 0 to 1000"),
        ({**ROW, "weight": "1e999"}, 'the field "weight" is inf'),
        ({**ROW, "weight": True}, 'the field "weight" is a JSON boolean'),
        ({**ROW, "verifier": "numbr"}, "there is no verifier 'numbr'. Did you mean number?"),
        ({**ROW, "verifier": "magic"}, "Known are number, choice, exact, contains"),
        ({**ROW, "images": ["a.png"]}, 'the field "images" has an image'),
        ({"prompt": "x", "answer": "4"}, "names no verifier"),
        ({"prompt": "x", "answer": "4", "kind": "essay"}, "none for its kind 'essay'"),
        ({"prompt": "x", "answer": ["a"]}, "none for an answer that is a list"),
    ],
)
def test_bad_rows_are_named_by_row_and_column(bad: Any, message: str) -> None:
    text = error_of(ROW, ROW, bad)
    assert text.startswith("data.jsonl:3: ") and message in text


def test_a_column_of_another_purpose_can_be_ignored() -> None:
    row = {**ROW, "weight": "70 kg", "reference": ["x"]}
    _, problem = read_one(row, columns={"weight": "", "reference": ""})
    assert (problem.weight, problem.reference) == (1.0, None)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the published data sets")
def test_published_files_load_as_they_are() -> None:
    counts = {}
    for path in sorted(SHARED.glob("*/*.json")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        name, problems = read_all(*rows)
        counts[path.parent.name] = counts.get(path.parent.name, 0) + len(problems)
        assert name == ("tooluse" if path.parent.name == "tooluse" else "sciknoweval")
    assert counts == {
        "sciknoweval-biology": 500,
        "sciknoweval-chemistry": 2100,
        "sciknoweval-material": 935,
        "tooluse": 68,
    }
