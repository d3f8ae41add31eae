"""Load problems from JSON lines, and choose the problems of each step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rosd_fast.data.rows import check_verifier, parse_row, read_rows
from rosd_fast.errors import UserError
from rosd_fast.quickstart import QUICKSTART
from rosd_fast.types import Problem


def load_problems(source: str, *, verifier: str | None = None) -> list[Problem]:
    """The problems of `source`: a file of JSON lines or one JSON list, or `quickstart:SPLIT`.

    `verifier` is for rows that name none. Raises UserError, with file and line, for a row that is
    not a problem.
    """
    if verifier is not None:
        check_verifier(verifier, where="data.verifier")
    if source.startswith(QUICKSTART):
        return load_quickstart(source)
    path = Path(source).expanduser()
    lines: dict[str, str] = {}  # id -> where it was first seen
    problems = []
    for where, row in read_rows(path):
        problem = parse_row(
            row,
            where=where,
            folder=path.resolve().parent.name,
            number=len(problems) + 1,
            verifier=verifier,
        )
        if problem.id in lines:
            raise UserError(
                f"the id {problem.id!r} was used before, at {lines[problem.id]}",
                where=where,
                fix="Give each problem its own id",
            )
        lines[problem.id] = where
        problems.append(problem)
    if not problems:
        raise UserError("the data set has no problems", where=source)
    return problems


def load_quickstart(source: str) -> list[Problem]:
    """The shipped problems of `quickstart:SPLIT`."""
    from rosd_fast.quickstart.tasks import SPLIT_SIZES, load_split

    wanted = source.removeprefix(QUICKSTART)
    for split in SPLIT_SIZES:
        if split == wanted:
            return list(load_split(split))
    raise UserError(
        "there is no such split", where=source, fix=f"Name one of {', '.join(SPLIT_SIZES)}"
    )


class ProblemStream:
    """The problems of each step. They depend on the step number alone, so resuming needs no state.

    Each epoch shuffles the problems by seed and epoch and cuts them into batches; problems that do
    not fill the last batch are left out of this epoch. Without shuffling, the problems repeat in
    the file's order.
    """

    def __init__(
        self, problems: Sequence[Problem], *, batch_size: int, seed: int, shuffle: bool
    ) -> None:
        if len(problems) < batch_size:
            raise UserError(
                f"the data set has {len(problems)} problems, fewer than the {batch_size} of a step",
                where="sample.problems_per_step",
                fix=f"Set it to at most {len(problems)}, or give more problems",
            )
        self._problems = tuple(problems)
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle

    @property
    def steps_per_epoch(self) -> float:
        """The number of steps that one pass over the problems takes."""
        total, size = len(self._problems), self._batch_size
        return total // size if self._shuffle else total / size

    def batch(self, step: int) -> list[Problem]:
        """The `batch_size` distinct problems of a step; the first step is 1."""
        if step < 1:
            raise ValueError(f"step is {step}, must be at least 1")
        return [self._problems[i] for i in self._indices(step - 1)]

    def _indices(self, number: int) -> list[int]:
        size, total = self._batch_size, len(self._problems)
        if not self._shuffle:
            return [i % total for i in range(number * size, (number + 1) * size)]
        epoch, place = divmod(number, total // size)
        order = np.random.default_rng((self._seed, epoch)).permutation(total)
        return order[place * size : (place + 1) * size].tolist()
