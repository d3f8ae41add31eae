"""Read rows that a test writes down."""

from __future__ import annotations

from typing import Any

import pytest

from rosd_fast.data.shapes import recognize
from rosd_fast.data.sources import Source
from rosd_fast.errors import UserError
from rosd_fast.types import Problem


def read_all(*rows: Any, **settings: Any) -> tuple[str, list[Problem]]:
    """The name of the rows' shape, and their problems. `settings` are those of the source."""
    source = Source(text="data.jsonl", **settings)
    shape = recognize(rows, source)
    problems = [
        shape.problem(
            row, where=f"data.jsonl:{number}", source=source, folder="here", number=number
        )
        for number, row in enumerate(rows, start=1)
    ]
    return shape.name, problems


def read_one(row: Any, **settings: Any) -> tuple[str, Problem]:
    """The name of the row's shape, and its problem."""
    name, (problem,) = read_all(row, **settings)
    return name, problem


def error_of(*rows: Any, **settings: Any) -> str:
    """The one line that reading the rows ends with."""
    with pytest.raises(UserError) as caught:
        read_all(*rows, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)
