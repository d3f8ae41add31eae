"""Rows of JSON: a line each, or the items of one list."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rosd_fast.data.readers.base import MAX_ROW_BYTES, ListRows, Rows
from rosd_fast.data.readers.files import RowFile, kind_of
from rosd_fast.data.sources import FILES
from rosd_fast.errors import UserError

MAX_LIST_BYTES = 256 * 2**20
"""A JSON list is read as a whole, so a larger one is refused."""
BOM = b"\xef\xbb\xbf"
BLANK = b" \t\r\n\v\f"
CHUNK = 4 * 2**20


def open_json(path: Path) -> Rows:
    """The rows of a file of JSON lines or of one JSON list, whichever it is."""
    file = RowFile(path)
    first = len(BOM) if file.read(0, min(file.size, len(BOM))) == BOM else 0
    head = file.read(first, min(file.size, first + CHUNK)).lstrip()
    return read_list(file, first) if head.startswith(b"[") else JsonLines(file, first)


def read_list(file: RowFile, first: int) -> Rows:
    """The items of a JSON list."""
    path = file.path
    if file.size > MAX_LIST_BYTES:
        raise UserError(
            f"the file is one JSON list of {file.size / 2**20:,.0f} MiB, which is read as a whole: "
            f"at most {MAX_LIST_BYTES // 2**20} MiB",
            where=str(path),
            fix=f"Write one object per line: jq -c '.[]' {path} > {path.with_suffix('.jsonl')}",
        )
    text = decode(file.read(first, file.size), path)
    rows = parse_json(text, path, fix="Close the list, or put each object on its own line")
    return ListRows(
        rows,
        name=str(path),
        folder=path.resolve().parent.name,
        item="item {number} of the list",
    )


class JsonLines(Rows):
    """The lines of a file that are not blank; in memory are only the places where they begin.

    first: the byte at which the first line begins.
    """

    def __init__(self, file: RowFile, first: int) -> None:
        self._file = file
        self.folder = file.path.resolve().parent.name
        self._starts, self._lines = index_lines(file, first)

    def __len__(self) -> int:
        return len(self._starts) - 1 if self._lines is None else len(self._lines)

    def __getitem__(self, index: int) -> Any:
        line = self._line(index)
        start, end = int(self._starts[line]), int(self._starts[line + 1])
        if end - start > MAX_ROW_BYTES:
            raise UserError(
                f"the line has {(end - start) / 2**20:,.1f} MiB, more than the "
                f"{MAX_ROW_BYTES // 2**20} MiB that a row may have",
                where=self.where(index),
                fix="Shorten it, or see whether line breaks are missing",
            )
        text = decode(self._file.read(start, end), self._file.path, line=line + 1)
        return parse_json(
            text.rstrip("\n"),
            self._file.path,
            first_line=line + 1,
            fix="Each line must hold one whole JSON object",
        )

    def batch(self, start: int, stop: int) -> Iterator[Any]:
        last = self._line(stop - 1)
        first, end = int(self._starts[self._line(start)]), int(self._starts[last + 1])
        if end - first <= MAX_ROW_BYTES:
            lines = self._file.read(first, end).split(b"\n")
            try:
                rows = json.loads(b"[" + b",".join(line for line in lines if line.strip()) + b"]")
            except (ValueError, RecursionError):
                rows = []
            if len(rows) == stop - start:
                return iter(rows)
        return super().batch(start, stop)

    def where(self, index: int) -> str:
        return f"{self._file.path}:{self._line(index) + 1}"

    def _line(self, index: int) -> int:
        """The number of a row's line, from 0."""
        return index if self._lines is None else int(self._lines[index])


def index_lines(file: RowFile, first: int) -> tuple[np.ndarray, np.ndarray | None]:
    """(starts [L + 1], lines [N]): where each line begins, with the end of the file last, and the
    numbers of the lines that are not blank; None where none is blank. Both int64."""
    starts, heads, position, at_start = [], [], first, True
    while position < file.size:
        data = np.frombuffer(file.read(position, min(file.size, position + CHUNK)), np.uint8)
        breaks = np.flatnonzero(data == ord("\n")) + 1
        begin = np.concatenate((np.zeros(int(at_start), np.int64), breaks))
        at_start = bool(data[-1] == ord("\n"))
        begin = begin[:-1] if at_start else begin  # that line begins in the next chunk, if any
        starts.append(begin + position)
        heads.append(data[begin])
        position += len(data)
    if not starts:
        return np.array([first]), None
    whole = np.append(np.concatenate(starts), file.size)
    return whole, _not_blank(file, whole, np.concatenate(heads))


def _not_blank(file: RowFile, starts: np.ndarray, heads: np.ndarray) -> np.ndarray | None:
    """The lines that are not blank; `heads` are their first bytes. None: all of them."""
    blank = heads == ord("\n")
    for line in np.flatnonzero(np.isin(heads, list(BLANK)) & ~blank).tolist():
        start, end = int(starts[line]), int(starts[line + 1])
        blank[line] = not file.read(start, min(end, start + MAX_ROW_BYTES)).strip()
    return np.flatnonzero(~blank) if blank.any() else None


def decode(data: bytes, path: Path, *, line: int = 1) -> str:
    """The text of bytes that begin at `line` of the file. Raises UserError."""
    try:
        if data[1:2] == b"\0" or data[:1] == b"\0":  # UTF-16 without a mark at the beginning
            raise UnicodeDecodeError("utf-8", data, 0, 1, "UTF-16")
        return data.decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        encoding = "utf-16" if b"\0" in data else "latin1"
        fix = f"Convert it: iconv -f {encoding} -t utf-8 {path}"
        if kind_of(path) not in FILES:
            fix = f"Files with rows end in {', '.join(FILES)}"
        raise UserError("the text is not UTF-8", where=f"{path}:{line}", fix=fix) from None


def parse_json(text: str, path: Path, *, first_line: int = 1, fix: str) -> Any:
    """The JSON value of `text`, which begins at `first_line` of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        what, line = f"{error.msg}, column {error.colno}", first_line + error.lineno - 1
    except RecursionError:
        what, line = "nested too deeply", first_line
    except ValueError:
        what, line = f"a number of more than {sys.get_int_max_str_digits()} digits", first_line
        fix = "Write it as text, in quotes"
    raise UserError(f"malformed JSON ({what})", where=f"{path}:{line}", fix=fix)
