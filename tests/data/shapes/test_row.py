"""Columns by name, in any case, and under a column map."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosd_fast.data.shapes.row import Row, map_columns
from rosd_fast.errors import UserError


def test_the_exact_name_goes_before_another_case() -> None:
    row = Row({"Answer": "1", "answer": "2", "Problem": "p"})
    assert (row.value("answer"), row.value("Answer"), row.value("problem")) == ("2", "1", "p")
    assert row.shown("problem") == "Problem"
    assert row.first("prompt", "problem") == "problem"
    assert row.first("prompt", "question") is None


def test_a_map_moves_columns_and_reaches_into_objects() -> None:
    values = {"q": "2 + 2?", "answer": "old", "meta": {"gold": {"text": "4"}}, "a.b": 1}
    mapped = map_columns(values, {"prompt": "q", "answer": "meta.gold.text", "weight": "a.b"})
    assert mapped == {"prompt": "2 + 2?", "answer": "4", "weight": 1, "meta": values["meta"]}
    assert map_columns({"weight": "heavy"}, {"weight": ""}) == {}
    assert map_columns({"q": "x"}, {"prompt": "q", "reference": "meta.worked"}) == {"prompt": "x"}


@given(st.dictionaries(st.text(max_size=3), st.integers(), max_size=4))
def test_a_map_onto_itself_changes_nothing_that_is_not_null(values: dict[str, int]) -> None:
    assert map_columns(values, {name: name for name in values if name}) == values


def test_errors_name_the_column_of_the_map() -> None:
    row = Row({"q": 5}, where="a.jsonl:3", columns={"prompt": "q", "answer": "gold"})
    with pytest.raises(UserError, match=r'^a\.jsonl:3: the field "q" is a JSON number'):
        row.text("prompt", required=True)
    with pytest.raises(UserError, match=r'"gold" is missing. data.columns.answer names it'):
        row.answer("answer")


def test_a_cell_may_hold_json_text() -> None:
    row = Row({"a": '[{"x": 1}]', "b": "[1", "c": "text", "d": [2], "e": '["\\ud800"]'})
    assert row.parsed("a") == [{"x": 1}]
    assert (row.parsed("c"), row.parsed("d"), row.parsed("missing")) == ("text", [2], None)
    assert row.parsed_or_none("b") is None
    with pytest.raises(UserError, match="malformed JSON"):
        row.parsed("b")
