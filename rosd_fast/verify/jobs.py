"""The records of a crew: jobs, the calls that they belong to, and the batches that workers get."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from rosd_fast.verify.origin import Origin
from rosd_fast.verify.protocol import Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a verifier is found. requires: packages to import with it."""

    origin: Origin
    requires: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A completion to judge.

    completion: None: the verifier's own example for the answer.
    answer: None: nothing is judged, the verifier is only loaded.
    """

    verifier: str
    completion: str | None
    answer: str | None


@dataclass(slots=True, eq=False)
class Call:
    """The jobs of one `Crew.run`, and what came of them.

    waiting: indices of the jobs that no worker has.
    left: number of jobs without an outcome.
    retried: jobs whose worker died before it said anything, so that it may not have begun them.
    hanging: number of workers that hang on one of its jobs.
    """

    jobs: Sequence[Job]
    waiting: deque[int]
    outcomes: list[Outcome | None]
    done: asyncio.Future[None]
    left: int
    hanging: int = 0
    retried: set[int] = field(default_factory=set)

    def settle(self, index: int, outcome: Outcome) -> None:
        """Note what came of a job, unless it is known: a job that was given back may run twice."""
        if self.outcomes[index] is None:
            self.outcomes[index] = outcome
            self.left -= 1
            if self.left == 0 and not self.done.done():
                self.done.set_result(None)

    def take(self, most: int) -> list[int]:
        """Up to `most` waiting jobs without an outcome."""
        taken: list[int] = []
        while self.waiting and len(taken) < most:
            index = self.waiting.popleft()
            if self.outcomes[index] is None:
                taken.append(index)
        return taken

    def give_back(self, indices: Sequence[int]) -> None:
        """Let other workers do these jobs."""
        self.waiting.extendleft(i for i in reversed(indices) if self.outcomes[i] is None)


@dataclass(slots=True, eq=False)
class Batch:
    """The jobs that a worker has: `left` are unanswered, the first of them is in progress.

    since: when it began. limit_s: how long it may take.
    loading: the verifier that the worker imports before it; empty: none.
    is_begun: whether the worker has said anything since it got the jobs.
    """

    call: Call
    left: deque[int]
    since: float
    limit_s: float
    loading: str = ""
    is_begun: bool = False

    def remaining_s(self) -> float:
        return self.since + self.limit_s - time.monotonic()
