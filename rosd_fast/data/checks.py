"""Check the rows of a data set before a run: is each a problem, with an id of its own?"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np

from rosd_fast.config import DataConfig
from rosd_fast.data.collection import Checked, Part, Problems
from rosd_fast.data.fields import unmatchable
from rosd_fast.errors import UserError
from rosd_fast.types import Problem

MAX_KEPT = 20_000  # problems that stay in memory, of a data set that has no more
MAX_FAULTS = 20  # bad rows that are described
MAX_APART = 2000  # answers of a large data set that worker processes judge before a run
AT_ONCE = 1000  # rows whose answers are verified together


def check(problems: Problems, data: DataConfig, first: int = 0) -> Problems:
    """What is left of `problems` after `data.check_rows` of them, or the first ones, were checked.

    Where two sources have the same ids, those of the later one begin with its name. Raises
    UserError for a bad row; with data.bad_rows skip it is left out instead.
    """
    total = len(problems)
    whole = first > 0 or not data.check_rows or data.check_rows >= total
    keep = whole and (first or total) <= MAX_KEPT
    good, bad, faults = array("q"), array("q"), []  # indices
    kept: dict[int, Problem] = {}
    ids = Ids(problems)
    chosen = range(total) if whole else sample(problems, data.check_rows)
    every = 1 if whole else max(1, len(chosen) // MAX_APART)
    with closing(problems.answers):
        for index, found in examine(problems, chosen, every=every):
            fault = found if isinstance(found, UserError) else ids.add(index, found.id)
            if fault is not None and data.bad_rows == "error":
                raise fault
            if isinstance(found, UserError) or fault is not None:
                bad.append(index)
                faults += [str(fault)] if len(faults) < MAX_FAULTS else []
                continue
            good.append(index)
            if keep:
                kept[index] = found
            if len(good) == first:
                break
    if not good:
        raise UserError(f"no row is a problem. The first: {faults[0]}")
    rows = np.asarray(problems.rows)
    checked = Checked(
        whole=whole,
        rows=rows[good],
        kept={int(rows[index]): problem for index, problem in ids.renamed(kept).items()},
        num_bad=len(bad),
        faults=tuple(faults),
    )
    left = checked.rows if first else np.delete(rows, bad) if bad else problems.rows
    return problems.with_rows(left, checked, ids.renamed_parts())


def sample(problems: Problems, count: int) -> list[int]:
    """`count` indices spread evenly, and the first problem of each source.

    The latter show whether two sources number their problems alike.
    """
    firsts = [bisect_left(problems.rows, part.first) for part in problems.parts]
    return sorted({*spread(len(problems), count), *firsts} - {len(problems)})


def spread(total: int, count: int) -> list[int]:
    """`count` of `total` rows, spread evenly; the first is row 0."""
    return (np.arange(count) * total // count).tolist()


def examine(
    problems: Problems, indices: Sequence[int], *, every: int = 1
) -> Iterator[tuple[int, Problem | UserError]]:
    """Each index with its problem, or with what is wrong with its row.

    every: as for `AnswerCheck.right`.
    """
    for start in range(0, len(indices), AT_ONCE):
        some = indices[start : start + AT_ONCE]
        found = [_attempt(problems, index) for index in some]
        read = [each for each in found if isinstance(each, Problem)]
        right = iter(problems.answers.right(read, every=every))
        for index, each in zip(some, found, strict=True):
            if isinstance(each, Problem) and not next(right):
                each = unmatchable(each, problems.where(index))
            yield index, each


def _attempt(problems: Problems, index: int) -> Problem | UserError:
    try:
        return problems[index]
    except UserError as error:
        return error


class Ids:
    """The ids of the problems seen, and the sources that share ids with an earlier one."""

    def __init__(self, problems: Problems) -> None:
        self._problems = problems
        self._parts = problems.parts
        self._seen: list[dict[str, int]] = [{} for _ in self._parts]  # id -> index, per source
        self._sharing: set[int] = set()

    def add(self, index: int, name: str) -> UserError | None:
        """Add the id of a problem. Returns the error for an id that its source has already."""
        number = self._number(index)
        before = self._seen[number].setdefault(name, index)
        if before != index:
            return UserError(
                f"the id {name!r} was used before, at {self._problems.where(before)}",
                where=self._problems.where(index),
                fix="Give each problem its own id",
            )
        if any(name in seen for seen in self._seen[:number]):
            self._sharing.add(number)
        return None

    def renamed_parts(self) -> list[Part]:
        """The sources, those that share ids with a prefix of their own."""
        return [
            replace(part, prefix=self._prefix(number) + part.prefix)
            for number, part in enumerate(self._parts)
        ]

    def renamed(self, kept: dict[int, Problem]) -> dict[int, Problem]:
        """Problems by index, under the ids that they have with the prefix of their source."""
        if not self._sharing:
            return kept
        return {
            index: replace(problem, id=self._prefix(self._number(index)) + problem.id)
            for index, problem in kept.items()
        }

    def _number(self, index: int) -> int:
        """The number of the source that a problem belongs to."""
        if len(self._parts) == 1:
            return 0
        return self._parts.index(self._problems.place(int(self._problems.rows[index]))[0])

    def _prefix(self, number: int) -> str:
        """The source's name, with a number where another has the same name; else empty."""
        if number not in self._sharing:
            return ""
        names = [part.source.name for part in self._parts[: number + 1]]
        count = Counter(names)[names[-1]]
        return f"{names[-1]}:" if count == 1 else f"{names[-1]}-{count}:"
