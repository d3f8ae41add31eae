"""Multiple choice with options in a column of their own."""

from __future__ import annotations

from typing import Any

import pytest

from tests.data.shapes.reading import error_of, read_all, read_one

LABELLED = {"text": ["iron", "wood", "glass"], "label": ["1", "2", "3"]}
PROMPT = "Which?\n\nA: iron\nB: wood\nC: glass"


@pytest.mark.parametrize(
    ("columns", "letter"),
    [
        ({"choices": LABELLED["text"], "answer": 1}, "B"),
        ({"choices": LABELLED["text"], "answer": "C"}, "C"),
        ({"choices": LABELLED["text"], "answer": "c"}, "C"),
        ({"choices": LABELLED["text"], "answer": "wood"}, "B"),
        ({"choices": LABELLED["text"], "answer": "0"}, "A"),
        ({"choices": '["iron", "wood", "glass"]', "answer": "1"}, "B"),  # a cell of a CSV file
        ({"choices": LABELLED, "answerKey": "3"}, "C"),
        ({"choices": {"text": LABELLED["text"], "label": ["A", "B", "C"]}, "answerKey": "A"}, "A"),
        ({"options": LABELLED["text"], "answer": "B", "answer_index": 1}, "B"),
        (
            {"options": {"A": "iron", "B": "wood", "C": "glass"}, "answer": "glass"},
            "C",
        ),
    ],
)
def test_options_become_lines_and_the_answer_a_letter(columns: dict[str, Any], letter: str) -> None:
    name, problem = read_one({"question": "Which?", **columns})
    assert name == "options"
    assert (problem.prompt, problem.answer, problem.verifier) == (PROMPT, letter, "choice")


def test_sciknoweval_of_the_hub_has_an_object_in_prompt() -> None:
    row = {
        "question": "Which?",
        "choices": {"text": ["iron", "wood", "glass"], "label": ["A", "B", "C"]},
        "answerKey": "B",
        "answer": "",
        "domain": "Chemistry",
        "prompt": {"default": "Give the letter."},
    }
    name, problem = read_one(row)
    assert (name, problem.prompt, problem.answer, problem.domain) == (
        "options",
        PROMPT,
        "B",
        "Chemistry",
    )


def test_labels_go_before_texts_and_texts_before_numbers() -> None:
    swapped = {"question": "Which?", "choices": ["B", "A"], "answer": "A"}
    assert read_one(swapped)[1].answer == "A"
    digits = {"question": "Which?", "choices": ["3", "2", "1"], "answer": "2"}
    assert read_one(digits)[1].answer == "B"
    assert read_one({**digits, "answer": 2})[1].answer == "C"


def test_the_subject_is_the_domain() -> None:
    row = {"question": "Which?", "choices": ["a", "b"], "answer": 0}
    assert read_one({**row, "subject": "abstract_algebra"})[1].domain == "abstract_algebra"
    assert read_one({**row, "category": "Computer Science"})[1].domain == "computer_science"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": -1}, '"answer" is -1, and the options are numbered from 0 to 1'),
        ({"answer": 2}, "numbered from 0 to 1"),
        ({"answer": "Z"}, "is 'Z', which is none of A, B"),
        ({"answer": ""}, "is '', which is none of A, B"),
        ({"answer": True}, '"answer" is a JSON boolean'),
        ({"answer": None}, '"answer" is null'),
        ({"choices": ["a"]}, '"choices" has 1 options'),
        ({"choices": [str(n) for n in range(27)]}, "has 27 options"),
        ({"choices": ["a", " "]}, "has an empty option"),
        ({"choices": ["a", None]}, "is not a list of texts"),
        ({"choices": ["a", "\ud800"]}, "surrogate"),
        ({"choices": {"x": ["a"]}}, "is not a list of texts"),
        ({"question": " "}, '"question" is empty'),
    ],
)
def test_bad_options_are_named(change: dict[str, Any], message: str) -> None:
    row = {"question": "Which?", "choices": ["a", "b"], "answer": 0}
    text = error_of(row, row, {**row, **change})
    assert text.startswith("data.jsonl:3: ") and message in text


def test_rows_of_several_kinds_of_answers_load() -> None:
    row = {"question": "Which?", "choices": ["a", "b"]}
    _, problems = read_all({**row, "answer": 1}, {**row, "answer": "A"})
    assert [p.answer for p in problems] == ["B", "A"]
