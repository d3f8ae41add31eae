"""Rows of CSV and TSV files."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rosd_fast.data.readers.base import MAX_ROW_BYTES
from rosd_fast.data.readers.csv import open_csv
from rosd_fast.data.readers.open import open_file
from rosd_fast.errors import UserError

CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), max_size=8)


def last_row(path: Path) -> Any:
    rows = open_csv(path, delimiter=",")
    return rows[len(rows) - 1]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(CELLS, CELLS)), st.sampled_from(",\t"), st.booleans(), st.booleans())
def test_rows_are_those_of_the_standard_reader(
    tmp_path_factory: pytest.TempPathFactory,
    cells: list[tuple[str, str]],
    delimiter: str,
    quote_all: bool,
    bom: bool,
) -> None:
    """With line breaks, quotes and separators in the values."""
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with path.open("w", newline="", encoding="utf-8-sig" if bom else "utf-8") as file:
        quoting = csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL
        writer = csv.writer(file, delimiter=delimiter, quoting=quoting)
        writer.writerows([("prompt", "answer"), *cells])
    rows = open_csv(path, delimiter=delimiter)
    found = [tuple(rows[i].values()) for i in range(len(rows))]
    assert found == cells
    assert all(list(rows[i]) == ["prompt", "answer"] for i in range(len(rows)))


def test_a_row_is_named_by_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,answer\n"What is\n2 + 3?",5\n\n\n1 + 1?,2\n6" pipe,x\n')
    rows = open_csv(path, delimiter=",")
    assert [rows[i]["answer"] for i in range(3)] == ["5", "2", "x"]
    assert [rows.where(i) for i in range(3)] == [f"{path}:{n}" for n in (2, 6, 7)]
    assert rows[2]["prompt"] == '6" pipe'  # a quote inside of a value is no quote


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "prompt,answer\nx,1\n"),
        ("a.csv", "prompt;answer\nx;1\n"),
        ("a.TSV", "prompt\tanswer\nx\t1"),
    ],
)
def test_what_separates_values(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    rows = open_file(path)
    assert (len(rows), rows[0]) == (1, {"prompt": "x", "answer": "1"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2,3\n", ":2: the row has 3 values, and the header 2 columns"),
        (b"a,b\n1\n", ":2: the row has 1 value, and the header 2 columns"),
        (b"a,b,a\n1,2,3\n", ":1: the header has the column 'a' twice. Rename one"),
        (b'a,b\n1,2\n"3,4\n', ":3: malformed CSV (unexpected end of data). Close quotes"),
        (b'a,b\n"1"x,2\n', ":2: malformed CSV"),
        (b"a,b\n1,\xe9\n", ":2: the text is not UTF-8. Convert it"),
        (b"\xe9,b\n1,2\n", ":1: the text is not UTF-8. Convert it"),
        (b"a,b\r1,2\r", ":1: malformed CSV"),
    ],
)
def test_damage_is_named_by_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        last_row(path)
    assert f"{path}{message}" in str(caught.value) and "\n" not in str(caught.value)


def test_a_line_that_is_too_long(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"a,b\n1,2\n" + b"x" * MAX_ROW_BYTES + b",3\n")
    with pytest.raises(UserError, match=r"a\.csv:3: the line has more than 32 MiB"):
        open_csv(path, delimiter=",")


@pytest.mark.parametrize("text", ["", "\n", "prompt,answer\n"])
def test_files_without_rows(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    assert len(open_csv(path, delimiter=",")) == 0
