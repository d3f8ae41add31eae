"""The number of threads on a machine that other processes use, too."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator

import pytest
import torch

from rosd_fast.threads import (
    PAUSE,
    WAITING,
    ThreadWatch,
    candidates,
    fastest,
    given,
    measure,
    wait_briefly,
)


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads is afterwards what it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


class Machine:
    """A machine whose speeds a test sets. seconds: of the work, by number of threads."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self.seconds, self.now, self.measured = seconds, 0.0, 0

    def measure(self, counts: Iterable[int]) -> dict[int, float]:
        self.measured += 1
        self.now += 0.1
        return {count: self.seconds[count] for count in counts}

    def clock(self) -> float:
        return self.now

    def watch(self, *, fixed: bool = False) -> ThreadWatch:
        return ThreadWatch(fixed=fixed, most=4, measure=self.measure, clock=self.clock)


IDLE, BUSY = {1: 3.0, 2: 1.6, 4: 1.0}, {1: 3.0, 2: 5.0, 4: 20.0}


@pytest.mark.parametrize(
    ("most", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]
)
def test_candidates(most: int, counts: list[int]) -> None:
    assert candidates(most) == counts


def test_a_small_gain_changes_nothing() -> None:
    assert fastest({1: 1.0, 2: 1.1}, current=2) == 2
    assert fastest({1: 1.0, 2: 1.2}, current=2) == 1
    assert fastest({1: 1.2, 2: 1.0}, current=1) == 2
    assert fastest({1: 1.0, 2: 1.0, 4: 2.0}, current=4) == 1


def test_measuring_times_each_number_and_restores_it(threads: None) -> None:
    seconds = measure([1, 2])
    assert set(seconds) == {1, 2}
    assert min(seconds.values()) > 0
    assert torch.get_num_threads() == 4


def test_an_idle_machine_keeps_its_threads_without_a_word(threads: None) -> None:
    assert Machine(IDLE).watch().begin() == ""
    assert torch.get_num_threads() == 4


def test_shared_cores_are_named_at_the_start(threads: None) -> None:
    note = Machine(BUSY).watch().begin()
    assert note.startswith("cores are shared with other processes: 1 thread, 6.7 times as fast")
    assert torch.get_num_threads() == 1


def test_a_slow_step_is_followed_by_a_measurement(threads: None) -> None:
    machine = Machine(IDLE)
    watch = machine.watch()
    watch.begin()
    for _ in range(3):
        machine.now += 10
        assert watch.step_done(3.0) == ""
    assert machine.measured == 1
    machine.seconds = BUSY
    machine.now += 30
    assert "1 thread" in watch.step_done(30.0)
    assert (machine.measured, torch.get_num_threads()) == (2, 1)


def test_threads_come_back_when_cores_are_free(threads: None) -> None:
    machine = Machine(BUSY)
    watch = machine.watch()
    watch.begin()
    machine.seconds = IDLE
    machine.now += 10
    assert watch.step_done(3.0).startswith("cores are free again: 4 threads, 3.0 times as fast")
    assert torch.get_num_threads() == 4


def test_measurements_take_a_small_part_of_the_time(threads: None) -> None:
    machine = Machine(BUSY)
    watch = machine.watch()
    watch.begin()
    for _ in range(100):
        machine.now += 0.5
        watch.step_done(0.5)
    assert machine.measured <= 2 + machine.now / (PAUSE * 0.1)


def test_a_given_number_stays(threads: None) -> None:
    machine = Machine(BUSY)
    watch = machine.watch(fixed=True)
    assert watch.begin() == watch.step_done(1.0) == watch.step_done(90.0) == ""
    assert (machine.measured, torch.get_num_threads()) == (0, 4)


def test_a_resumed_run_begins_with_its_number(threads: None) -> None:
    """Also where fewer threads would be faster now; with at most the threads there are."""
    machine = Machine(BUSY)
    assert machine.watch().begin(recorded=2) == ""
    assert torch.get_num_threads() == 2
    machine.watch().begin(recorded=64)
    assert torch.get_num_threads() == 4
    assert machine.measured == 0


def test_the_users_environment_wins() -> None:
    environ = {"OMP_WAIT_POLICY": "ACTIVE"}
    wait_briefly(environ)
    assert environ == {"OMP_WAIT_POLICY": "ACTIVE"}
    assert not given(environ)
    assert given({"OMP_NUM_THREADS": "1"})
    empty: dict[str, str] = {}
    wait_briefly(empty)
    assert empty == WAITING


def test_the_command_line_sets_it_before_torch_is_loaded() -> None:
    script = (
        "import os, sys\n"
        "from rosd_fast.cli import main\n"
        "assert main(['--version']) == 0\n"
        "assert os.environ['GOMP_SPINCOUNT'] and 'torch' not in sys.modules\n"
    )
    environ = {name: value for name, value in os.environ.items() if name not in WAITING}
    environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", script], check=True, env=environ)
