"""How many threads torch computes with on a CPU, on a machine that may not be the run's alone.

The threads of one operation wait for each other at its end. Where another process takes a core, all
wait for the thread that has none, and by default they spin for milliseconds meanwhile: operations
of 50 microseconds then take a hundred times as long. Three things help:

    wait_briefly   a waiting thread sleeps after some 20 microseconds, set before torch is loaded
    measure        when a run begins: one thread, two, four, ..., which of them is the fastest now?
    ThreadWatch    measures again when a step was slow, and when cores may have become free

Other threads of the process that use torch must take one thread each (`background`): once all of
them together are more than the cores, libgomp's waiting threads no longer spin at all.

How many threads share a matrix product can change its rounding, so a checkpoint holds the number,
and a resumed run begins with it. OMP_NUM_THREADS fixes the number; nothing is measured then.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field

SPIN_COUNT = "1000"  # of libgomp, about 20 microseconds: the other threads' usual delay
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": SPIN_COUNT}
GIVEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

ROUNDS = 4  # of a measurement
BUDGET_S = 0.3  # after which a measurement begins no further round
GAIN = 1.15  # another number of threads must be this many times as fast
SLOW = 1.5  # a step is slow where it takes this many times as long as the fastest one
PAUSE = 30  # measurements' lengths between two of them


def wait_briefly(environ: MutableMapping[str, str] = os.environ) -> None:
    """Let threads that wait sleep soon, unless the environment already says how they wait.

    OpenMP reads it when torch is loaded.
    """
    if not any(name in environ for name in (*WAITING, "KMP_BLOCKTIME")):
        environ.update(WAITING)


def given(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the user, or torchrun, has chosen the number of threads."""
    return any(environ.get(name) for name in GIVEN)


def candidates(most: int) -> list[int]:
    """The numbers of threads to compare, at most `most`: powers of two and `most` itself."""
    return sorted({most, *(2**power for power in range(most.bit_length()) if 2**power <= most)})


def measure(counts: Iterable[int]) -> dict[int, float]:
    """Seconds of the same work with each number of threads, in turns so that all are disturbed.

    The work is like a run's: small operations, as in decoding, and a larger matrix product. It
    takes up to half a second. The number of threads is afterwards what it was.
    """
    import torch

    before = torch.get_num_threads()
    work = _work()
    seconds = dict.fromkeys(counts, 0.0)
    try:
        for count in seconds:  # starts the threads
            torch.set_num_threads(count)
            work()
        begun = time.perf_counter()
        for _ in range(ROUNDS):
            for count in seconds:
                torch.set_num_threads(count)
                start = time.perf_counter()
                work()
                seconds[count] += time.perf_counter() - start
            if time.perf_counter() - begun > BUDGET_S:
                break
    finally:
        torch.set_num_threads(before)
    return seconds


def _work() -> Callable[[], None]:
    """The work that is timed: half of it small operations, half a matrix product."""
    import torch
    from torch.nn import functional

    rows, hidden = 128, 192
    states = torch.ones(rows, hidden)
    up, down = torch.ones(hidden, 3 * hidden), torch.ones(3 * hidden, hidden)
    left, right = torch.ones(512, 512), torch.ones(512, 512)

    def run() -> None:
        with torch.inference_mode():
            for _ in range(12):
                torch.mm(functional.silu(torch.mm(states, up)), down)
            for _ in range(2):
                torch.mm(left, right)

    return run


def fastest(seconds: Mapping[int, float], *, current: int) -> int:
    """`current`, unless another number of threads is `GAIN` times as fast.

    An idle machine thus gives the same number each time.
    """
    best = min(seconds, key=lambda count: (seconds[count], count))
    return best if seconds[current] > GAIN * seconds[best] else current


@dataclass(slots=True)
class ThreadWatch:
    """Chooses the number of threads when a run begins, and again when its steps have become slow.

    fixed: the number is given, or irrelevant: nothing is measured.
    most: threads of an idle machine.
    clock: seconds; measure: as the function of that name.
    """

    fixed: bool
    most: int
    measure: Callable[[Iterable[int]], Mapping[int, float]] = measure
    clock: Callable[[], float] = time.perf_counter
    _fastest_s: float = field(default=float("inf"), init=False)
    _cost_s: float = field(default=0.0, init=False)
    _measured_at: float = field(default=0.0, init=False)

    def begin(self, recorded: int | None = None) -> str:
        """Choose the number of threads; return a line for the user, mostly empty.

        recorded: that of the checkpoint that the run resumes from, which is used as it is.
        """
        import torch

        if self.fixed:
            return ""
        if recorded is not None:
            torch.set_num_threads(min(recorded, self.most))
            return ""
        return self._choose()

    def step_done(self, seconds: float) -> str:
        """Measure again if a step that took `seconds` was slow, or if fewer threads than `most` are
        used; return a line for the user if the number of threads has changed."""
        import torch

        if self.fixed:
            return ""
        slow = seconds > SLOW * self._fastest_s
        self._fastest_s = min(self._fastest_s, seconds)
        rested = self.clock() - self._measured_at > PAUSE * self._cost_s
        if rested and (slow or torch.get_num_threads() < self.most):
            return self._choose()
        return ""

    def _choose(self) -> str:
        import torch

        begun = self.clock()
        before = torch.get_num_threads()
        seconds = self.measure(candidates(self.most))
        count = fastest(seconds, current=before)
        self._measured_at = self.clock()
        self._cost_s = self._measured_at - begun
        if count == before:
            return ""
        torch.set_num_threads(count)
        self._fastest_s = float("inf")
        return describe(count, before, seconds)


def watch_threads(*, on_cpu: bool, num_ranks: int = 1) -> ThreadWatch:
    """The watch of a process. Several ranks, and a run on a GPU, keep torch's number of threads."""
    import torch

    return ThreadWatch(fixed=given() or not on_cpu or num_ranks > 1, most=torch.get_num_threads())


def describe(count: int, before: int, seconds: Mapping[int, float]) -> str:
    """The line that tells of a changed number of threads."""
    ratio = seconds[before] / seconds[count]
    why = "cores are shared with other processes" if count < before else "cores are free again"
    speed = f"{ratio:.1f} times as fast as {before}"
    return f"{why}: {_threads(count)}, {speed} (OMP_NUM_THREADS fixes the number)"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"
