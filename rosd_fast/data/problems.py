"""Problems: the rows of all sources, made into problems when asked for.

    sources -> rows (`readers`) -> shape -> Problem

A data set of any size takes the memory of an index: a row is read, and made a problem, when its
index is asked for. `data.check_rows` rows are checked before a run starts. All rows of a small data
set are, and its problems stay in memory.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import overload

import numpy as np

from rosd_fast.config import DataConfig
from rosd_fast.data.fields import check_verifier
from rosd_fast.data.instruct import instructed
from rosd_fast.data.readers.base import Rows
from rosd_fast.data.readers.open import open_rows
from rosd_fast.data.shapes import Shape, recognize
from rosd_fast.data.sources import Source, parse_sources
from rosd_fast.errors import UserError
from rosd_fast.types import Problem

LOOKED_AT = 100  # first rows of a source by which its shape is recognized


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A source as it was read.

    first: the index of its first row among the rows of all sources.
    prefix: what its ids begin with because another source has the same ids; else empty.
    """

    source: Source
    rows: Rows
    shape: Shape
    first: int
    prefix: str = ""

    def problem(self, number: int) -> Problem:
        """The problem of a row, counted from the source's first. Raises UserError."""
        problem = self.shape.problem(
            self.rows[number],
            where=self.rows.where(number),
            source=self.source,
            folder=self.rows.folder,
            number=number + 1,
        )
        return replace(problem, id=self.prefix + problem.id) if self.prefix else problem


class Problems(Sequence[Problem]):
    """The problems of a data set. `problems[i]` raises UserError if its row is not a problem.

    parts: the sources.
    rows: the number of each problem's row among the rows of all sources; they ascend.
    instruction: the option data.answer_instruction.
    is_checked: whether every problem was checked; then `problems[i]` raises nothing.
    num_bad: rows that were left out (data.bad_rows skip). bad: the first of them, described.
    """

    def __init__(
        self, parts: Sequence[Part], *, instruction: str, rows: Sequence[int] | np.ndarray
    ) -> None:
        self.parts = tuple(parts)
        self.instruction = instruction
        self.rows = rows
        self.is_checked = False
        self.num_bad = 0
        self.bad: tuple[str, ...] = ()
        self._firsts = [part.first for part in self.parts]
        self._checked_rows: np.ndarray = np.array([], np.int64)
        self._kept: dict[int, Problem] = {}  # row -> problem

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> Problems: ...
    def __getitem__(self, index: int | slice) -> Problem | Problems:
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        row = int(self.rows[index])
        return self._kept.get(row) or self._read(row)

    def bare(self, index: int) -> Problem:
        """The problem without an answer instruction. Raises UserError."""
        part, number = self._place(int(self.rows[index]))
        return part.problem(number)

    def where(self, index: int) -> str:
        """The place of a problem's row, for messages."""
        part, number = self._place(int(self.rows[index]))
        return part.rows.where(number)

    def source(self, index: int) -> Source:
        """The source of a problem."""
        return self._place(int(self.rows[index]))[0].source

    @property
    def sizes(self) -> list[int]:
        """The number of problems of each source."""
        bounds = np.searchsorted(np.asarray(self.rows), self._firsts)
        return np.diff(bounds, append=len(self)).tolist()

    @property
    def recognized(self) -> list[tuple[Source, Shape, int]]:
        """Each source, its shape, and the number of its problems."""
        return [(p.source, p.shape, size) for p, size in zip(self.parts, self.sizes, strict=True)]

    @property
    def checked(self) -> Problems:
        """The problems that were checked: all of a small data set, a sample of a large one."""
        if self.is_checked:
            return self
        return self.select(np.flatnonzero(np.isin(np.asarray(self.rows), self._checked_rows)))

    def select(self, indices: Sequence[int] | np.ndarray) -> Problems:
        """The problems at `indices`, which ascend."""
        chosen = np.asarray(self.rows)[np.asarray(indices, np.int64)]
        part = Problems(self.parts, instruction=self.instruction, rows=chosen)
        part.is_checked = self.is_checked or bool(np.isin(chosen, self._checked_rows).all())
        part.num_bad, part.bad = self.num_bad, self.bad
        part._checked_rows, part._kept = self._checked_rows, self._kept
        return part

    def find_bad(self) -> Iterator[tuple[int, UserError]]:
        """The index and the fault of each row that is not a problem; this reads all rows."""
        for index in range(0 if self.is_checked else len(self)):
            try:
                self[index]
            except UserError as error:
                yield index, error

    def _place(self, row: int) -> tuple[Part, int]:
        """The source of a row, and its number there."""
        part = self.parts[bisect_right(self._firsts, row) - 1]
        return part, row - part.first

    def _read(self, row: int) -> Problem:
        part, number = self._place(row)
        problem = part.problem(number)
        return problem if part.source.is_quickstart else instructed(problem, self.instruction)


def load_problems(text: str, *, data: DataConfig | None = None, first: int = 0) -> Problems:
    """The problems of the sources in `text`, such as "a.jsonl,b.parquet@weight=0.5".

    data: how they are read and checked; text stands for its train. first: only so many problems,
    the first ones, all of them checked; 0: all problems, of which data.check_rows are checked.

    Raises UserError, with file, row and column, for what is not a problem.
    """
    data = data or DataConfig()
    if data.verifier is not None:
        check_verifier(data.verifier, where="data.verifier")
    sources = parse_sources(text, verifier=data.verifier, columns=data.columns.model_dump())
    parts = open_parts(sources)
    total = sum(len(part.rows) for part in parts)
    problems = Problems(parts, instruction=data.answer_instruction, rows=range(total))
    if not total:
        raise UserError("the data set has no problems", where=text)
    return check(problems, data, first)


def open_parts(sources: Sequence[Source]) -> list[Part]:
    """The sources, opened, and their shapes recognized. Raises UserError."""
    parts, total = [], 0
    for source in sources:
        rows = open_rows(source)
        if len(rows):
            parts.append(Part(source=source, rows=rows, shape=shape_of(rows, source), first=total))
        elif len(sources) > 1:
            raise UserError("the data set has no problems", where=source.text)
        total += len(rows)
    return parts


def shape_of(rows: Rows, source: Source) -> Shape:
    """The shape of a source's rows, by the first that can be read. Raises UserError."""
    sample = []
    for number in range(min(LOOKED_AT, len(rows))):
        with suppress(UserError):  # it is reported when the rows are checked
            sample.append(rows[number])
    return recognize(sample, source)
