"""The worker processes of a pool and the queue of their tasks, on an event loop of their own.

    calls, each with tasks -> workers take turns between calls -> outcomes, in each call's order

A worker has several tasks at a time, so that it never waits for the next one, and answers in their
order: when it dies or takes too long, the first unanswered task is to blame, and the others go to
another worker. A worker that hangs gives the tasks behind that one back after `STALL_S`. When all
workers hang and other calls wait, one more is started, for those.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rosd_fast.errors import RunFailed, UserError
from rosd_fast.verify.origin import Origin
from rosd_fast.verify.process import Worker, start_worker
from rosd_fast.verify.protocol import (
    Description,
    Failure,
    Limits,
    Outcome,
    failed,
    load_line,
    read_outcome,
    task_line,
)

START_S = 60.0  # until a worker has started
LATE_S = 0.1  # for an answer that came as the time was up
LOAD_S = 120.0  # to import a verifier
STALL_S = 0.25  # on one task, until the tasks behind it are given back
BATCH_S = 0.02  # a batch that takes less is followed by one twice as large
MAX_BATCH = 64
MAX_STARTS = 3  # failures in a row to start a worker
MAX_WORKERS = 8


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
    hanging: number of workers that hang on one of its jobs.
    """

    jobs: Sequence[Job]
    waiting: deque[int]
    outcomes: list[Outcome | None]
    done: asyncio.Future[None]
    left: int
    hanging: int = 0

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
    """

    call: Call
    left: deque[int]
    since: float
    limit_s: float
    loading: str = ""

    def remaining_s(self) -> float:
        return self.since + self.limit_s - time.monotonic()


class Crew:
    """Runs jobs in worker processes, which start when they are needed.

    descriptions: what the files of verifiers say, by name.
    broken: what is wrong with verifiers that could not be loaded, by name.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.num_workers = limits.workers or min(num_cores(), MAX_WORKERS)
        self.descriptions: dict[str, Description] = {}
        self.broken: dict[str, UserError] = {}
        self._addresses: dict[str, Address] = {}
        self._calls: deque[Call] = deque()
        self._tasks: dict[asyncio.Task[None], bool] = {}  # -> whether it is the spare worker's
        self._batches: dict[Worker, Batch] = {}  # of the workers that have one
        self._more = asyncio.Event()
        self._failed_starts = 0
        self._is_closing = False

    async def run(self, jobs: Sequence[Job], addresses: Mapping[str, Address]) -> list[Outcome]:
        """What came of each job, in order.

        Raises UserError for a verifier that could never be loaded, and RunFailed when workers
        cannot be started at all.
        """
        if not jobs:
            return []
        self._addresses |= addresses
        done = asyncio.get_running_loop().create_future()
        call = Call(jobs, deque(range(len(jobs))), [None] * len(jobs), done, len(jobs))
        self._calls.append(call)
        self._wake()
        try:
            await done
        finally:  # also when the caller is cancelled: jobs that no worker has are dropped
            self._calls.remove(call)
        for name in {job.verifier for job in jobs} & self.broken.keys():
            if name not in self.descriptions:
                raise self.broken[name]
        return [outcome for outcome in call.outcomes if outcome is not None]

    async def describe(self, name: str, address: Address) -> Description:
        """What a verifier's file says of it. Raises UserError when it cannot be loaded."""
        await self.run([Job(verifier=name, completion=None, answer=None)], {name: address})
        return self.descriptions[name]

    async def close(self) -> None:
        """End all processes. Calls that are not done fail."""
        self._is_closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail(RunFailed("the verifiers' worker processes were closed"))

    def _wake(self) -> None:
        """Let idle workers look for jobs, and start more workers where jobs are left."""
        if self._is_closing:
            return
        self._more.set()
        self._more = asyncio.Event()
        waiting = sum(len(call.waiting) for call in self._calls)
        regular = sum(not spare for spare in self._tasks.values())
        idle = regular - sum(not worker.spare for worker in self._batches)
        for _ in range(min(self.num_workers - regular, waiting - idle)):
            self._start(spare=False)
        others = any(call.waiting and not call.hanging for call in self._calls)
        if others and self._all_hang() and not any(self._tasks.values()):
            self._start(spare=True)

    def _all_hang(self) -> bool:
        """Whether no worker but the spare one gets on."""
        hanging = sum(worker.hangs and not worker.spare for worker in self._batches)
        return hanging >= self.num_workers

    def _start(self, *, spare: bool) -> None:
        task = asyncio.get_running_loop().create_task(self._work(spare))
        self._tasks[task] = spare
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Forget a worker's task; its error ends all calls."""
        del self._tasks[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        for call in self._calls:
            if not call.done.done():
                call.done.set_exception(error)

    async def _work(self, spare: bool) -> None:
        """Keep one worker process at work; start it again when it ends."""
        while True:
            worker = await self._open(spare)
            try:
                while not worker.ended:
                    call, indices = await self._take(worker)
                    if worker.ended:  # it died while it was idle: no job is to blame
                        call.give_back(indices)
                        break
                    await self._do(worker, call, indices)
            finally:
                await asyncio.shield(worker.kill())

    async def _open(self, spare: bool) -> Worker:
        """A worker that has started. Raises RunFailed when that has failed too often."""
        while True:
            worker = await start_worker(self.limits, spare=spare)
            started = False
            try:
                started = await worker.read(START_S) is not None
            except TimeoutError:
                pass
            finally:
                if not started:
                    await asyncio.shield(worker.kill())
            if started:
                self._failed_starts = 0
                return worker
            self._failed_starts += 1
            if self._failed_starts >= MAX_STARTS:
                why = await worker.errors()
                raise RunFailed(f"the verifiers' worker processes do not start: {why}")

    async def _take(self, worker: Worker) -> tuple[Call, list[int]]:
        """The next jobs for a worker, all of one call. Calls take turns."""
        while True:
            useful = not worker.spare or self._all_hang()
            for _ in range(len(self._calls) if useful else 0):
                call = self._calls[0]
                self._calls.rotate(-1)
                if worker.spare and call.hanging:
                    continue
                share = max(1, len(call.waiting) // self.num_workers)
                if indices := call.take(min(worker.batch, share)):
                    return call, indices
            await self._more.wait()

    async def _do(self, worker: Worker, call: Call, indices: Sequence[int]) -> None:
        """Have a worker do jobs; those that are left when it ends are given back."""
        begin = time.monotonic()
        sent = self._send(worker, call, indices)
        batch = Batch(call, deque(sent), begin, self.limits.timeout_s)
        self._batches[worker] = batch
        try:
            while batch.left and await self._answer(worker, batch):
                pass
        finally:
            self._gets_on(worker, batch)
            del self._batches[worker]
            call.give_back(batch.left)
            self._wake()
        quick = time.monotonic() - begin < BATCH_S
        worker.batch = min(2 * worker.batch, MAX_BATCH) if quick else max(1, worker.batch // 2)

    def _send(self, worker: Worker, call: Call, indices: Sequence[int]) -> list[int]:
        """Write jobs to a worker; return those that were written: a verifier may be broken."""
        lines, sent = [], []
        for index in indices:
            job = call.jobs[index]
            if job.verifier in self.broken:
                error = self.broken[job.verifier]
                call.settle(index, failed("failed", f"the verifier cannot be loaded: {error}"))
                continue
            if job.verifier not in worker.loaded:
                worker.loaded.add(job.verifier)
                address = self._addresses[job.verifier]
                lines.append(load_line(job.verifier, address.origin, address.requires))
            lines.append(task_line(job.verifier, job.completion, job.answer))
            sent.append(index)
        worker.write(lines)
        return sent

    async def _answer(self, worker: Worker, batch: Batch) -> bool:
        """Wait for a worker's next message; whether the worker goes on."""
        try:
            patience_s = batch.remaining_s() if worker.hangs else STALL_S
            message = await worker.read(max(LATE_S, min(patience_s, batch.remaining_s())))
        except TimeoutError:
            if batch.remaining_s() > 0:
                self._stalls(worker, batch)
                return True
            self._blame(batch, "timed_out", f"timed out after {batch.limit_s:g} s")
            await worker.kill()
            return False
        if message is None:
            how = describe_exit(await worker.kill())
            self._blame(batch, "died", f"the verifier died ({how})")
            return False
        self._gets_on(worker, batch)
        batch.since, batch.limit_s = time.monotonic(), self.limits.timeout_s
        name = batch.loading
        batch.loading = ""
        if message["kind"] == "begun":
            batch.limit_s, batch.loading = LOAD_S, message["name"]
        elif message["kind"] == "broken":
            about = {key: message[key] for key in ("what", "where", "fix")}
            self.broken[name] = UserError(**about)
        elif message["kind"] == "loaded":
            self.descriptions[name] = Description(**message["description"])
        else:
            batch.call.settle(batch.left.popleft(), read_outcome(message))
            if message["last"]:
                await worker.kill()
                return False
        return True

    def _stalls(self, worker: Worker, batch: Batch) -> None:
        """Give the jobs behind the one in progress back. This worker may still come to them."""
        worker.hangs, worker.batch = True, 1
        batch.call.hanging += 1
        batch.call.give_back([*batch.left][1:])
        self._wake()

    def _gets_on(self, worker: Worker, batch: Batch) -> None:
        if worker.hangs:
            worker.hangs = False
            batch.call.hanging -= 1

    def _blame(self, batch: Batch, failure: Failure, reason: str) -> None:
        """The job in progress has failed, and its verifier too if that was being imported."""
        index = batch.left.popleft()
        if batch.loading:
            self.broken[batch.loading] = UserError(
                f"{reason} while it was imported", where=batch.loading
            )
        batch.call.settle(index, failed(failure, reason))


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe_exit(status: int) -> str:
    """How a process ended, in words."""
    if status >= 0:
        return f"exit code {status}"
    if status == -signal.SIGKILL:
        return "killed, out of memory?"
    return signal.Signals(-status).name
