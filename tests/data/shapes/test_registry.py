"""Which shape rows have, and what an error says of rows that have none."""

from __future__ import annotations

from typing import Any

import pytest

from rosd_fast.data.shapes import Fields, recognize, register_shape, registry
from rosd_fast.data.sources import Source
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
        ({"query": "x"}, {"prompt": "qery"}, ["no row has the column 'qery'", "mean query?"]),
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
