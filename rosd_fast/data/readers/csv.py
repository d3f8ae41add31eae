"""Rows of CSV and TSV files, whose first line names the columns. All values are text."""

from __future__ import annotations

import csv
import io
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rosd_fast.data.readers.base import MAX_ROW_BYTES, Rows
from rosd_fast.data.readers.files import RowFile
from rosd_fast.data.readers.json import BOM, decode
from rosd_fast.errors import UserError

MIB = 2**20


def open_csv(path: Path, *, delimiter: str) -> Rows:
    """The rows of a file. Raises UserError for a header that is not one."""
    return CsvRows(RowFile(path), delimiter)


class CsvRows(Rows):
    """The rows below the header; in memory are only the places where they begin.

    A row may have several lines, as text in quotes may have line breaks. Blank lines are left out.
    delimiter: between values; "," becomes ";" where the header has no comma.
    """

    def __init__(self, file: RowFile, delimiter: str) -> None:
        self._file, self._delimiter = file, delimiter
        self.folder = file.path.resolve().parent.name
        first = len(BOM) if file.read(0, min(file.size, len(BOM))) == BOM else 0
        head = file.read(first, min(file.size, first + MIB)).partition(b"\n")[0]
        if delimiter == "," and b"," not in head and b";" in head:
            self._delimiter = ";"
        self._starts, self._lines = self._index(first)
        self._columns = self._header() if self._lines else []

    def __len__(self) -> int:
        return max(0, len(self._lines) - 1)

    def __getitem__(self, index: int) -> Any:
        values = self._read(index + 1)
        if len(values) != len(self._columns):
            raise UserError(
                f"the row has {len(values)} value{'s' if len(values) > 1 else ''}, and the header "
                f"{len(self._columns)} columns",
                where=self.where(index),
                fix='Put values with separators or line breaks in quotes: "1,5"',
            )
        return dict(zip(self._columns, values, strict=True))

    def where(self, index: int) -> str:
        return f"{self._file.path}:{self._lines[index + 1]}"

    def _header(self) -> list[str]:
        columns = [name.strip() for name in self._read(0)]
        for number, name in enumerate(columns):
            if name in columns[:number]:
                raise UserError(
                    f"the header has the column {name!r} twice",
                    where=f"{self._file.path}:{self._lines[0]}",
                    fix="Rename one",
                )
        return columns

    def _read(self, number: int) -> list[str]:
        """The values of a row; row 0 is the header."""
        line = self._lines[number]
        data = self._file.read(self._starts[number], self._starts[number + 1])
        text = io.StringIO(decode(data, self._file.path, line=line), newline="")
        try:
            return next(csv.reader(text, delimiter=self._delimiter, strict=True))
        except csv.Error as error:
            raise self._malformed(error, line) from None

    def _index(self, first: int) -> tuple[array[int], array[int]]:
        """(starts [R + 1], lines [R]) of header and rows: their first bytes, with the end of the
        file last, and their first lines, from 1."""
        starts, lines = array("q"), array("I")
        position, line = first, 1

        def pieces() -> Iterator[str]:
            nonlocal position
            self._file.file.seek(first)
            while piece := self._file.file.readline(MAX_ROW_BYTES + 1):
                if len(piece) > MAX_ROW_BYTES:
                    raise UserError(
                        f"the line has more than {MAX_ROW_BYTES // MIB} MiB",
                        where=f"{self._file.path}:{line}",
                        fix="Shorten it, or see whether line breaks are missing",
                    )
                position += len(piece)
                yield piece.decode("latin-1")  # every byte a character: only separators matter

        csv.field_size_limit(MAX_ROW_BYTES)
        reader = csv.reader(pieces(), delimiter=self._delimiter)
        start = first
        try:
            for row in reader:
                if row:
                    starts.append(start)
                    lines.append(line)
                start, line = position, reader.line_num + 1
        except csv.Error as error:
            raise self._malformed(error, line) from None
        starts.append(position)
        return starts, lines

    def _malformed(self, error: csv.Error, line: int) -> UserError:
        return UserError(
            f"malformed CSV ({error})",
            where=f"{self._file.path}:{line}",
            fix='Close quotes, and write a quote in a value as ""',
        )
