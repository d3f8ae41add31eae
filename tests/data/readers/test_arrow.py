"""Rows of parquet and Arrow files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from rosd_fast.data.readers import arrow as reader
from rosd_fast.data.readers.open import open_file
from rosd_fast.errors import UserError

ROWS: list[dict[str, Any]] = [
    {"prompt": "a", "answer": 1, "turns": [{"role": "user", "content": "x"}]},
    {"prompt": None, "answer": 2, "turns": []},
    {"prompt": "c\u2028", "answer": None, "turns": None},
]


def write(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, **options)
        return path
    new = pa.ipc.new_file if options.get("whole") else pa.ipc.new_stream
    with new(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.parquet", {"row_group_size": 2, "compression": "zstd"}),
        ("a.parquet", {"use_dictionary": ["prompt"]}),
        ("a.arrow", {"whole": True}),
        ("a.arrow", {"whole": False}),
    ],
)
def test_rows_in_any_order(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    path = write(tmp_path / name, ROWS, **options)
    rows = open_file(path)
    assert len(rows) == 3 and rows.folder == tmp_path.name
    assert [rows[i] for i in (2, 0, 1)] == [ROWS[2], ROWS[0], ROWS[1]]
    assert rows.where(2) == f"{path}, row 3"


def test_columns_of_categories(tmp_path: Path) -> None:
    """Each row group has a dictionary of its own."""
    column = pa.array(["x", "y", "x", "z"]).dictionary_encode()
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"domain": column}), path, row_group_size=2)
    rows = open_file(path)
    assert [rows[i]["domain"] for i in range(4)] == ["x", "y", "x", "z"]


def test_memory_is_given_back_while_rows_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "RELEASE_EVERY", 2)
    path = write(tmp_path / "a.parquet", [{"n": n} for n in range(50)])
    rows = open_file(path)
    assert [rows[i]["n"] for i in range(50)] == list(range(50))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize("damage", ["empty", "cut", "zeros", "other"])
def test_a_damaged_file_gets_one_line(tmp_path: Path, name: str, damage: str) -> None:
    path = write(tmp_path / name, [{"prompt": "x" * n, "answer": n} for n in range(100)])
    whole = path.read_bytes()
    damaged = {
        "empty": b"",
        "cut": whole[:-200],
        "zeros": whole[:8] + bytes(200) + whole[208:],
        "other": b'{"prompt": "x", "answer": 1}\n',
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(UserError, match=r"cannot be read as .*whether it is whole") as caught:
        open_file(path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{path}: ")


def test_a_row_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = open_file(write(tmp_path / "a.parquet", [{"a": "x"}, {"a": "x" * 5000}]))
    monkeypatch.setattr(reader, "MAX_ROW_BYTES", 4000)
    assert rows[0] == {"a": "x"}
    with pytest.raises(UserError, match=r"a\.parquet, row 2: the row has 0\.0 MiB, more than"):
        rows[1]


def test_text_that_is_not_utf_8(tmp_path: Path) -> None:
    text = pa.array([b"fine", b"\xff"]).view(pa.string())
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"prompt": text}), path)
    rows = open_file(path)
    assert rows[0] == {"prompt": "fine"}
    with pytest.raises(UserError, match=r"a\.parquet, row 2: a value cannot be read"):
        rows[1]


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        UserError, match=r'parquet files need pyarrow. pip install "rosd-fast\[data'
    ):
        open_file(path)
