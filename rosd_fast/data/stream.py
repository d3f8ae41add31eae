"""The problems of each step.

They depend on the step number alone, so resuming needs no state. Each epoch shuffles the problems
by seed and epoch and cuts them into batches; problems that do not fill the last batch are left out
of this epoch. Without shuffling, the problems repeat in the file's order.

A source of weight 1.5 is in each epoch once, and a half of its problems, by seed and epoch, a
second time. The copies of a problem are spread over the epoch, and no batch has a problem twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np

from rosd_fast.data.collection import Problems
from rosd_fast.errors import RunFailed, UserError
from rosd_fast.types import Problem

MAX_BAD_IN_A_ROW = 10_000  # bad rows one after the other that end a run


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """The problems of a step. bad: what is wrong with the rows that others replaced."""

    problems: list[Problem]
    bad: tuple[str, ...] = ()


class ProblemStream:
    """The problems of each step.

    problems: of one data set; the weights of its sources count where it is `Problems`.
    """

    def __init__(
        self, problems: Sequence[Problem], *, batch_size: int, seed: int, shuffle: bool
    ) -> None:
        self._problems = problems
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._check: Callable[[Problem], None] | None = None
        lazy = isinstance(problems, Problems)
        self._sizes = problems.sizes if lazy else [len(problems)]
        self._weights = [part.source.weight for part in problems.parts] if lazy else [1.0]
        self._is_checked = not lazy or problems.is_checked
        self._epoch_size = sum(map(num_draws, self._sizes, self._weights))
        self._order: tuple[int, np.ndarray] | None = None  # of the epoch asked for last
        check_size(len(problems), self._epoch_size, batch_size)

    def with_check(self, check: Callable[[Problem], None]) -> ProblemStream:
        """The same stream, which asks `check` of problems that were not checked before the run.

        Another row takes the place of one for which it raises UserError.
        """
        stream = copy(self)
        stream._check = check
        return stream

    @property
    def steps_per_epoch(self) -> float:
        """The number of steps that one pass over the problems takes."""
        total, size = self._epoch_size, self._batch_size
        return total // size if self._shuffle else total / size

    def batch(self, step: int) -> list[Problem]:
        """The `batch_size` distinct problems of a step; the first step is 1."""
        return self.draw(step).problems

    def draw(self, step: int) -> Draw:
        """The problems of a step, and the bad rows that others replaced.

        A row is replaced by the next good one in the file's order that is not in the batch. Raises
        RunFailed when too many rows in a row are bad.
        """
        if step < 1:
            raise ValueError(f"step is {step}, must be at least 1")
        wanted = self._indices(step - 1)
        taken, bad = set(wanted), []
        chosen: dict[int, Problem] = {}
        ids: set[str] = set()
        for index in wanted:
            place = self._next_good(index, chosen, taken, ids, bad)
            ids.add(chosen[place].id)
        return Draw(problems=list(chosen.values()), bad=tuple(bad))

    def _next_good(
        self,
        index: int,
        chosen: dict[int, Problem],
        taken: set[int],
        ids: set[str],
        bad: list[str],
    ) -> int:
        """Add the problem at `index`, or else the next good one that is not taken, to `chosen`."""
        place = index
        for _ in range(min(len(self._problems), MAX_BAD_IN_A_ROW)):
            if place not in chosen and (place == index or place not in taken):
                taken.add(place)
                problem = self._attempt(place, ids, bad)
                if problem is not None:
                    chosen[place] = problem
                    return place
            place = (place + 1) % len(self._problems)
        raise RunFailed(f"no row is left for a step. {bad[-1] if bad else ''}")

    def _attempt(self, index: int, ids: set[str], bad: list[str]) -> Problem | None:
        """The problem, or None, with what is wrong with its row added to `bad`."""
        if self._is_checked:
            return self._problems[index]
        assert isinstance(self._problems, Problems)
        try:
            problem = self._problems.verified(index)
            if self._check is not None:
                self._check(problem)
        except UserError as error:
            bad.append(str(error))
            return None
        if problem.id in ids:
            bad.append(
                f"{self._problems.where(index)}: the id {problem.id!r} is in this step twice"
            )
            return None
        return problem

    def _indices(self, number: int) -> list[int]:
        """The places of a batch's problems; batch 0 is the first. A place may be in it twice."""
        size, total = self._batch_size, self._epoch_size
        if self._shuffle:
            epoch, place = divmod(number, total // size)
            return self._epoch(epoch)[place * size : (place + 1) * size].tolist()
        epoch, start = divmod(number * size, total)
        indices = self._epoch(epoch)[start : start + size].tolist()
        return indices + self._epoch(epoch + 1)[: size - len(indices)].tolist()

    def _epoch(self, epoch: int) -> np.ndarray:
        """[draws] int64, the order of an epoch."""
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._make_order(epoch))
        return self._order[1]

    def _make_order(self, epoch: int) -> np.ndarray:
        rng, total = np.random.default_rng((self._seed, epoch)), len(self._problems)
        if any(weight != 1.0 for weight in self._weights):
            return weighted_order(self._sizes, self._weights, rng, shuffle=self._shuffle)
        return rng.permutation(total) if self._shuffle else np.arange(total)


def weighted_order(
    sizes: Sequence[int], weights: Sequence[float], rng: np.random.Generator, *, shuffle: bool
) -> np.ndarray:
    """[draws] int64: each place as often as the weight of its source says, spread over the epoch.

    A place that is drawn c times stands once in each c-th of the epoch.
    """
    total = sum(sizes)
    counts = np.concatenate([_copies(*each, rng) for each in zip(sizes, weights, strict=True)])
    offset = rng.random(total) if shuffle else np.arange(total) / total
    places = np.repeat(np.arange(total), counts)
    copy = np.arange(len(places)) - np.repeat(np.cumsum(counts) - counts, counts)
    return places[np.argsort((copy + offset[places]) / counts[places], kind="stable")]


def num_draws(size: int, weight: float) -> int:
    """How many problems an epoch draws of a source; at least one of a source that has any."""
    return max(min(1, size), int(weight) * size + round(weight % 1.0 * size))


def _copies(size: int, weight: float, rng: np.random.Generator) -> np.ndarray:
    """[size] int64: how often an epoch draws each problem of a source."""
    counts = np.full(size, int(weight))
    counts[rng.permutation(size)[: num_draws(size, weight) - int(weight) * size]] += 1
    return counts


def check_size(num_problems: int, epoch_size: int, batch_size: int) -> None:
    """Raise UserError if a data set does not fill a batch with distinct problems."""
    fewest = min(num_problems, epoch_size)
    if fewest < batch_size:
        what = "problems" if epoch_size >= num_problems else "problems per epoch by its weights"
        raise UserError(
            f"the data set has {fewest} {what}, fewer than the {batch_size} of a step",
            where="sample.problems_per_step",
            fix=f"Set it to at most {fewest}, or give more problems",
        )
