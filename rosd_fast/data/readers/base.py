"""Rows: what a source holds, read one at a time when asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from rosd_fast.errors import UserError

MAX_ROW_BYTES = 32 * 2**20
"""Larger rows are refused: such a line is a damaged file more often than a problem."""


class Rows(ABC):
    """The rows of a source; row 0 is the first.

    folder: the domain of rows that name none, such as the name of the file's folder.
    files: the files that were read, where the user named a folder or a pattern.
    """

    folder: str = ""
    files: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int:
        """The number of rows."""

    @abstractmethod
    def __getitem__(self, index: int) -> Any:
        """A row as a JSON value: an object, unless the row is bad.

        Raises UserError for a row that cannot be read.
        """

    def batch(self, start: int, stop: int) -> Iterator[Any]:
        """The rows from `start` to before `stop`; None for one that cannot be read.

        A reader that reads many rows at once faster than one by one does so.
        """
        for index in range(start, stop):
            try:
                yield self[index]
            except UserError:
                yield None

    def domain(self, index: int) -> str:
        """The domain of a row that names none."""
        return self.folder

    @abstractmethod
    def where(self, index: int) -> str:
        """The place of a row in an error message: "train.jsonl:17", "x.parquet, row 3"."""


class ListRows(Rows):
    """Rows that are in memory.

    item: how a row is named, with {number} for its number from 1.
    """

    def __init__(
        self, rows: Sequence[Any], *, name: str, folder: str, item: str = "row {number}"
    ) -> None:
        self._rows, self._name, self._item = rows, name, item
        self.folder = folder

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return self._rows[index]

    def where(self, index: int) -> str:
        return f"{self._name}, {self._item.format(number=index + 1)}"


class ChainedRows(Rows):
    """The rows of several files, one file after the other.

    folder: the domain of all of them; empty: each file has its own.
    """

    def __init__(self, parts: Sequence[Rows], *, files: Sequence[str], folder: str = "") -> None:
        self._parts = tuple(parts)
        self._firsts = [0, *accumulate(len(part) for part in parts)]
        self.folder, self.files = folder, tuple(files)

    def __len__(self) -> int:
        return self._firsts[-1]

    def __getitem__(self, index: int) -> Any:
        part, row = self._place(index)
        return part[row]

    def batch(self, start: int, stop: int) -> Iterator[Any]:
        while start < stop:
            part, row = self._place(start)
            count = min(stop - start, len(part) - row)
            yield from part.batch(row, row + count)
            start += count

    def domain(self, index: int) -> str:
        part, row = self._place(index)
        return self.folder or part.domain(row)

    def where(self, index: int) -> str:
        part, row = self._place(index)
        return part.where(row)

    def _place(self, index: int) -> tuple[Rows, int]:
        number = bisect_right(self._firsts, index) - 1
        return self._parts[number], index - self._firsts[number]
