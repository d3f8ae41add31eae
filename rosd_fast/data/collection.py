"""`Problems`: the rows of all sources, made into problems when asked for.

    Source -> Rows -> Shape -> Problem

A data set of any size takes the memory of an index: a row is read, and made a problem, when its
index is asked for. The problems of a small data set stay in memory.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, overload

import numpy as np

from rosd_fast.data.instruct import instructed
from rosd_fast.data.verifiable import AnswerCheck
from rosd_fast.types import Problem

if TYPE_CHECKING:
    from rosd_fast.data.readers.base import Rows
    from rosd_fast.data.shapes import Shape
    from rosd_fast.data.sources import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A source as it was read.

    first: the number of its first row among the rows of all sources.
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
            folder=self.rows.domain(number),
            number=number + 1,
        )
        return replace(problem, id=self.prefix + problem.id) if self.prefix else problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What was checked of a data set before a run.

    whole: whether all of it was.
    rows: [n] int64, the good ones among the rows that were checked; they ascend.
    kept: problems that stay in memory, by row.
    num_bad: bad rows that were left out. faults: the first of them, described.
    """

    whole: bool = False
    rows: np.ndarray = field(default_factory=lambda: np.array([], np.int64))
    kept: Mapping[int, Problem] = field(default_factory=dict)
    num_bad: int = 0
    faults: tuple[str, ...] = ()


class Problems(Sequence[Problem]):
    """The problems of a data set. `problems[i]` raises UserError if its row is not a problem.

    parts: the sources.
    rows: the number of each problem's row among the rows of all sources; they ascend.
    instruction: the option data.answer_instruction.
    answers: tells whether a completion can be right.
    check: what was checked of the data set.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        rows: Sequence[int] | np.ndarray,
        *,
        instruction: str,
        answers: AnswerCheck,
        check: Checked | None = None,
    ) -> None:
        self.parts, self.rows = tuple(parts), rows
        self.instruction, self.answers = instruction, answers
        self.check = check or Checked()
        self._firsts = [part.first for part in self.parts]

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
        if (kept := self.check.kept.get(row)) is not None:
            return kept
        part, number = self.place(row)
        problem = part.problem(number)
        self.answers.open(problem.verifier, part.rows.where(number))
        return problem if part.source.is_quickstart else instructed(problem, self.instruction)

    def bare(self, index: int) -> Problem:
        """The problem without an answer instruction. Raises UserError."""
        part, number = self.place(int(self.rows[index]))
        return part.problem(number)

    def verified(self, index: int) -> Problem:
        """The problem, if a completion can be right. Raises UserError."""
        problem = self[index]
        if (fault := self.answers.fault(problem, self.where(index))) is not None:
            raise fault
        return problem

    def where(self, index: int) -> str:
        """The place of a problem's row, for messages."""
        part, number = self.place(int(self.rows[index]))
        return part.rows.where(number)

    def place(self, row: int) -> tuple[Part, int]:
        """The source of a row, and the row's number there."""
        part = self.parts[bisect_right(self._firsts, row) - 1]
        return part, row - part.first

    @property
    def sizes(self) -> list[int]:
        """The number of problems of each source."""
        bounds = [bisect_left(self.rows, first) for first in self._firsts]
        return [end - start for start, end in pairwise([*bounds, len(self)])]

    @property
    def recognized(self) -> list[tuple[Source, Shape, int]]:
        """Each source, its shape, and the number of its problems."""
        return [(p.source, p.shape, size) for p, size in zip(self.parts, self.sizes, strict=True)]

    @property
    def is_checked(self) -> bool:
        """Whether all problems were checked; then `problems[i]` raises nothing."""
        if len(self) > len(self.check.rows):
            return self.check.whole
        return self.check.whole or bool(np.isin(self.rows, self.check.rows).all())

    @property
    def checked(self) -> Problems:
        """The problems that were checked: all of a small data set, a sample of a large one."""
        return self if self.check.whole else self.select_rows(self.check.rows)

    def select(self, indices: Sequence[int] | np.ndarray) -> Problems:
        """The problems at `indices`, which ascend."""
        rows = np.asarray(self.rows)[np.asarray(indices, np.int64)]
        return self.with_rows(rows, self.check)

    def select_rows(self, rows: np.ndarray) -> Problems:
        """Those of the problems whose row is among `rows`, which ascend."""
        left = rows[np.isin(rows, np.asarray(self.rows), assume_unique=True)]
        return self.with_rows(left, self.check)

    def without(self, rows: np.ndarray) -> Problems:
        """The problems whose row is not among `rows`."""
        own = np.asarray(self.rows)
        return self.with_rows(own[~np.isin(own, rows)], self.check)

    def with_rows(
        self, rows: Sequence[int] | np.ndarray, check: Checked, parts: Sequence[Part] | None = None
    ) -> Problems:
        """The problems of other rows of the data set, with what was checked of it."""
        return Problems(
            parts or self.parts,
            rows,
            instruction=self.instruction,
            answers=self.answers,
            check=check,
        )

    def notes(self) -> list[str]:
        """What a user is told of the data set: shapes, files, and what was not checked."""
        notes = []
        for source, shape, size in self.recognized:
            if not source.is_quickstart:
                notes.append(f"{source.text}: {_count(size, 'problem')}, read as {shape.says}")
        for part in self.parts:
            if part.rows.files:
                notes.append(f"{part.source.text}: read {_listed(part.rows.files)}")
        if self.check.num_bad:
            notes.append(
                f"left out {_count(self.check.num_bad, 'bad row')}; {self.check.faults[0]}"
            )
        if not self.is_checked:
            notes.append(
                f"{len(self.check.rows):,} of {len(self):,} rows were checked; the others are "
                "when they are drawn"
            )
        return notes


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _listed(files: Sequence[str], limit: int = 5) -> str:
    """The names of files, the first ones where there are many."""
    more = len(files) - limit
    return ", ".join(files[:limit]) + (f" and {more:,} more" if more > 0 else "")
