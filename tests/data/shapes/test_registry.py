"""Which shape rows have, and what an error says of rows that have none."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rosd_fast.data.shapes import Fields, Row, Shape, recognize, register_shape, registry
from rosd_fast.data.sources import Source
from rosd_fast.errors import UserError
from rosd_fast.types import Problem
from tests.data.shapes.reading import error_of, read_all, read_one

SUM: dict[str, Any] = {"prompt": "2 + 2 = ?", "answer": "4", "verifier": "number"}


def test_half_of_the_rows_decide_and_the_others_must_fit() -> None:
    worked = {"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"}
    plain = {"question": "1 + 2?", "answer": "3"}
    text = error_of(worked, worked, plain)
    assert text.startswith('data.jsonl:3: the field "answer" has no ####')
    assert "GSM8K: answer after ####" in text and "data.bad_rows=skip" in text
    assert read_all(worked, plain, plain, verifier="contains")[0] == "own"


def test_a_column_map_goes_before_recognition() -> None:
    row = {"query": "1 + 1?", "meta": {"gold": "1 + 1 = 2\n#### 2"}, "answer": "unused"}
    name, problem = read_one(row, columns={"prompt": "query", "answer": "meta.gold"})
    assert (name, problem.prompt, problem.answer) == ("gsm8k", "1 + 1?", "2")


@pytest.mark.parametrize(
    ("row", "columns", "parts"),
    [
        (
            {"query": "x", "gold": "4"},
            {},
            ["columns are query, gold", "data.columns.prompt=COLUMN data.columns.answer=COLUMN"],
        ),
        ({"prompt": "x", "gold": "4"}, {}, ["problem is in prompt", "@answer=COLUMN"]),
        ({"answer": "x", "text": "4"}, {}, ["Name it: data.columns.prompt=COLUMN, or"]),
        ({f"c{n}": 1 for n in range(30)}, {}, ["c11 and 18 more"]),
        ({}, {}, ["columns are none"]),
        ({"query": "x"}, {"prompt": "query1"}, ["no row has the column 'query1'", "mean query?"]),
        ({"a": {"b": 1}}, {"prompt": "a.c"}, ["no row has the column 'a.c'", "Columns are a"]),
    ],
)
def test_unknown_rows_name_their_columns_and_the_way_out(
    row: Any, columns: dict[str, str], parts: list[str]
) -> None:
    text = error_of(row, columns=columns)
    assert text.startswith("data.jsonl: ")
    for part in parts:
        assert part in text


@pytest.mark.parametrize(("row", "name"), [("text", "string"), (None, "null"), ([1], "list")])
def test_rows_that_are_no_objects(row: Any, name: str) -> None:
    assert error_of(row).startswith(f"data.jsonl:1: is a JSON {name}, not an object")
    assert error_of(SUM, row).startswith(f"data.jsonl:2: is a JSON {name}, not an object")


def test_a_new_shape_is_tried_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    register_shape(
        "trivia",
        lambda row: Fields(prompt=row.text("prompt"), answer=row.answer("aliases")),
        says="trivia",
        columns=("prompt", "aliases"),
    )
    row = {**SUM, "aliases": ["four", "4"]}
    assert recognize([row], Source(text="x")).name == "trivia"
    assert recognize([SUM], Source(text="x")).name == "own"
    with pytest.raises(ValueError, match="already"):
        register_shape("trivia", lambda row: Fields(prompt="", answer=""), says="", columns=("a",))
    with pytest.raises(ValueError, match="name its columns"):
        register_shape("other", lambda row: Fields(prompt="", answer=""), says="")


COLUMNS = (
    "prompt problem question text answer solution ground_truth messages conversations choices "
    "options answerKey kind metadata reward_model data_source extra_info ability test_list test "
    "tests entry_point canonical_solution task_id code setup test_imports id idx domain system "
    "verifier reference teacher_prompt feedback weight type images Answer"
).split()
TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        [
            r"\boxed{1}",
            "#### 5",
            "[1]",
            '[{"role": "user"}]',
            '{"tests": [',
            "mcq",
            "tooluse",
            "\ud800",
        ]
    ),
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                "role content from value text label type tests stdin inputs Action".split()
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


def attempt(shape: Shape, row: Any, source: Source) -> Problem | str:
    """The row's problem, or the line that says why it is none."""
    try:
        return shape.problem(row, where="x:1", source=source, folder="f", number=1)
    except UserError as error:
        return str(error)


@settings(suppress_health_check=[HealthCheck.too_slow])  # the tables of characters are made once
@given(st.dictionaries(st.sampled_from(COLUMNS), VALUES, max_size=8))
def test_every_row_is_a_problem_or_a_users_mistake(values: dict[str, Any]) -> None:
    source = Source(text="x", verifier="exact")
    for shape in registry._REGISTERED.values():
        shape.matches(Row(values))
        found = attempt(shape, values, source)
        if isinstance(found, str):
            assert "\n" not in found and found.startswith("x:1: ")
            continue
        problem = found
        for text in (problem.id, problem.prompt, problem.answer, problem.verifier, problem.domain):
            assert text.strip() and text.encode()
        for turn in problem.messages:
            assert turn.content.encode()
        assert 0 <= problem.weight < float("inf")
