"""Verify completions in worker processes: with limits, and beside whatever else runs.

A verifier that hangs, dies, raises or returns nonsense gives the score 0 and a reason, is counted,
and is said once; no step is lost, and no other completion is judged differently.

The pool has a thread with an event loop of its own. So it can be asked from several event loops and
from code without one, also while the loop that asks computes something else.
"""

from __future__ import annotations

import asyncio
import importlib.util
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, Self, TypeVar

from rosd_fast.errors import UserError
from rosd_fast.types import Group, Judgement, Problem, Verdict
from rosd_fast.verify.crew import Address, Crew, Job
from rosd_fast.verify.here import refuse_in_worker
from rosd_fast.verify.origin import origin_of
from rosd_fast.verify.protocol import FAILURES, Failure, Limits, Outcome
from rosd_fast.verify.registry import VERIFIERS, Verifier
from rosd_fast.verify.sandbox import INSTALL, unavailable
from rosd_fast.verify.user_file import add_user_verifier, is_user_file, user_origin

Task = tuple[Problem, str]
"""A problem and a completion to judge."""

T = TypeVar("T")


class VerifierPool:
    """Judges completions in worker processes, which start with the first task.

    limits: what a worker may use.
    note: is told once per verifier and cause that a verifier failed; None: nobody is.
    """

    def __init__(
        self, limits: Limits | None = None, note: Callable[[str], None] | None = None
    ) -> None:
        self.limits = limits or Limits()
        self.note = note
        self._thread: LoopThread | None = None
        self._lock = threading.Lock()
        self._counts: Counter[Failure] = Counter()
        self._noted: set[tuple[str, Failure]] = set()

    async def judge(self, tasks: Sequence[Task]) -> list[Judgement]:
        """The judgements, in the order of the tasks.

        Raises UserError for a verifier that no worker could load, and RunFailed when no worker can
        be started. If it is cancelled, what has not begun is not done.
        """
        jobs = jobs_of(tasks)
        return self._judgements(
            tasks, await asyncio.wrap_future(self._submit(lambda crew: run_jobs(crew, jobs)))
        )

    def judge_sync(self, tasks: Sequence[Task]) -> list[Judgement]:
        """The same for code outside of an event loop, as while data is loaded."""
        jobs = jobs_of(tasks)
        return self._judgements(tasks, self._submit(lambda crew: run_jobs(crew, jobs)).result())

    async def verify(self, groups: Sequence[Group], *, threshold: float) -> dict[str, Verdict]:
        """The verdict on every rollout, by its id: a success has at least `threshold`."""
        rollouts = [(group.problem, r) for group in groups for r in group.rollouts]
        judged = await self.judge([(problem, r.text) for problem, r in rollouts])
        return {
            r.id: verdict(r.id, judgement, threshold)
            for (_, r), judgement in zip(rollouts, judged, strict=True)
        }

    def open(self, name: str, *, where: str = "") -> Verifier:
        """The verifier of a name; one in a user's file is loaded in a worker to see that it can be.

        where: what names it, for errors. Raises UserError for a file that cannot be loaded, for a
        package that is missing and for code that cannot or must not be run here, and KeyError for
        another name that does not exist.
        """
        if not is_user_file(name) or name in VERIFIERS:
            check_available(VERIFIERS[name], self.limits, where)
            return VERIFIERS[name]
        address = Address(origin=user_origin(name, where=where))
        description = self._submit(lambda crew: crew.describe(name, address)).result()
        return add_user_verifier(name, address.origin, description)

    def check_answers(self, answers: Sequence[tuple[str, str]]) -> list[Judgement]:
        """What each verifier says of its own example of a completion that is right.

        answers: (verifier, right answer) of each problem. Less than 1 means that no completion can
        be right. Where no example can show that, the score is that of `Verifier.accepts`.
        """
        judged: dict[int, Judgement] = {}
        for i, (name, answer) in enumerate(answers):
            if (accepts := VERIFIERS[name].accepts) is not None:
                judged[i] = Judgement(score=float(accepts(answer)), answer=answer)
        left = [i for i in range(len(answers)) if i not in judged]
        jobs = [example_job(*answers[i]) for i in left]
        outcomes = self._submit(lambda crew: run_jobs(crew, jobs)).result() if jobs else []
        judged |= {i: outcome.judgement for i, outcome in zip(left, outcomes, strict=True)}
        return [judged[i] for i in range(len(answers))]

    def take_metrics(self) -> dict[str, float]:
        """How many completions a verifier failed on since the last call, by what happened."""
        counts, self._counts = self._counts, Counter()
        return {f"verify/{failure}": float(counts[failure]) for failure in FAILURES}

    async def close(self) -> None:
        """End the worker processes. The next task starts new ones."""
        await asyncio.to_thread(self.close_sync)

    def close_sync(self) -> None:
        """The same for code outside of an event loop."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close_sync()

    def _submit(self, work: Callable[[Crew], Coroutine[Any, Any, T]]) -> Future[T]:
        """Begin something on the pool's event loop."""
        refuse_in_worker("verifies")
        with self._lock:
            if self._thread is None:
                self._thread = LoopThread(self.limits)
            thread = self._thread
        return asyncio.run_coroutine_threadsafe(work(thread.crew), thread.loop)

    def _judgements(self, tasks: Sequence[Task], outcomes: Sequence[Outcome]) -> list[Judgement]:
        """The judgements; failures are counted, and the first of each kind is noted."""
        for (problem, _), outcome in zip(tasks, outcomes, strict=True):
            if outcome.failure is None:
                continue
            self._counts[outcome.failure] += 1
            cause = (problem.verifier, outcome.failure)
            if cause not in self._noted and self.note is not None:
                self._noted.add(cause)
                self.note(
                    f"verifier {problem.verifier}, problem {problem.id}: "
                    f"{outcome.judgement.reason}; the score is 0. verify/{outcome.failure} counts "
                    "such completions"
                )
        return [outcome.judgement for outcome in outcomes]


class LoopThread:
    """A thread with an event loop, on which a crew works.

    It ends with `close`, when nobody refers to it any more, and at the end of the program.
    """

    def __init__(self, limits: Limits) -> None:
        self.loop = asyncio.new_event_loop()
        self.crew = Crew(limits)
        thread = threading.Thread(target=self.loop.run_forever, name="verifiers", daemon=True)
        thread.start()
        self.close = weakref.finalize(self, shut_down, self.loop, self.crew, thread)


def shut_down(loop: asyncio.AbstractEventLoop, crew: Crew, thread: threading.Thread) -> None:
    """End a crew's processes, its loop and its thread."""
    if threading.current_thread() is thread:  # the last reference went there; it cannot wait here
        threading.Thread(target=shut_down, args=(loop, crew, thread)).start()
        return
    asyncio.run_coroutine_threadsafe(crew.close(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def check_available(verifier: Verifier, limits: Limits, where: str) -> None:
    """Raise UserError where a verifier cannot be used here."""
    about = where or f"the verifier {verifier.name}"
    for package in verifier.requires:
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"the verifier {verifier.name} needs the package {package.replace('_', '-')}",
                where=about,
                fix=f'Install it: pip install "rosd-fast[{verifier.extra}]"',
            )
    if not verifier.runs_code:
        return
    if not limits.run_code:
        raise UserError(
            f"the verifier {verifier.name} runs code that the model writes",
            where=about,
            fix="Allow it with verify.run_code (--verify.run-code)",
        )
    if (why := unavailable()) is not None:
        raise UserError(
            f"the verifier {verifier.name} cannot run code: {why}", where=about, fix=INSTALL
        )


async def run_jobs(crew: Crew, jobs: Sequence[Job]) -> list[Outcome]:
    """What came of each job, in order."""
    return await crew.run(jobs, addresses_of(job.verifier for job in jobs))


def jobs_of(tasks: Sequence[Task]) -> list[Job]:
    return [
        Job(verifier=problem.verifier, completion=completion, answer=problem.answer)
        for problem, completion in tasks
    ]


def example_job(name: str, answer: str) -> Job:
    """A job that judges a completion which should be right."""
    verifier = VERIFIERS[name]
    example = None if verifier.origin is not None else verifier.perfect(answer)
    return Job(verifier=name, completion=example, answer=answer)


def addresses_of(names: Iterable[str]) -> dict[str, Address]:
    """Where the verifiers are found. Raises UserError for one that a worker could not find, and
    ValueError for one that does not exist."""
    addresses = {}
    for name in set(names):
        if name in VERIFIERS:
            verifier = VERIFIERS[name]
            origin = verifier.origin or origin_of(verifier.function, name)
            addresses[name] = Address(origin=origin, requires=verifier.requires)
        elif is_user_file(name):
            addresses[name] = Address(origin=user_origin(name))
        else:
            raise ValueError(f"there is no verifier {name!r}, only {', '.join(VERIFIERS)}")
    return addresses


def verdict(rollout_id: str, judgement: Judgement, threshold: float) -> Verdict:
    """The verdict on a rollout; a success has a score of at least `threshold`."""
    return Verdict(
        rollout_id=rollout_id,
        score=judgement.score,
        success=judgement.score >= threshold,
        answer=judgement.answer,
        reason=judgement.reason,
    )
