"""Work in the background: in one thread, in order, and with its errors."""

from __future__ import annotations

import asyncio
import threading
from contextvars import ContextVar
from pathlib import Path

import pytest
import torch

from rosd_fast.background import THREAD_NAME, in_background

TASKS = Path("/proc/self/task")
WHO: ContextVar[str] = ContextVar("WHO", default="nobody")


def test_calls_are_made_one_after_the_other_beside_the_event_loop() -> None:
    may_go_on, diary, names = threading.Event(), [], set()

    def work(number: int, *, last: bool = False) -> tuple[int, str]:
        names.add(threading.current_thread().name)
        assert may_go_on.wait(60)
        diary.append(number)
        return number, WHO.get()

    async def main() -> list[tuple[int, str]]:
        WHO.set("the caller")
        calls = [asyncio.create_task(in_background(work, number)) for number in range(4)]
        await asyncio.sleep(0)  # the event loop goes on meanwhile
        assert not any(call.done() for call in calls)
        may_go_on.set()
        return await asyncio.gather(*calls)

    assert asyncio.run(main()) == [(number, "the caller") for number in range(4)]
    assert diary == [0, 1, 2, 3] and names == {f"{THREAD_NAME}_0"}


def test_errors_are_the_callers() -> None:
    def fail() -> None:
        raise KeyError("nothing")

    async def main() -> int:
        with pytest.raises(KeyError, match="nothing"):
            await in_background(fail)
        return await in_background(int, "7")  # the thread goes on

    assert asyncio.run(main()) == 7


def test_a_new_event_loop_uses_the_same_thread() -> None:
    found = {asyncio.run(in_background(threading.get_ident)) for _ in range(3)}
    assert len(found) == 1 and threading.get_ident() not in found


@pytest.mark.skipif(not TASKS.is_dir(), reason="threads are counted on Linux only")
def test_torch_starts_no_threads_for_the_background() -> None:
    """Or the threads that wait for the learner's next operation would spin no longer."""

    def compute() -> int:
        (torch.ones(2000, 2000) @ torch.ones(2000, 2000)).add_(1)
        return torch.get_num_threads()

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        compute()
        asyncio.run(in_background(int))  # the thread has started
        tasks = set(TASKS.iterdir())
        assert asyncio.run(in_background(compute)) == 1
        assert set(TASKS.iterdir()) == tasks
        assert torch.get_num_threads() == 3
        torch.ones(300, 300, requires_grad=True).square().sum().backward()
        assert torch.get_num_threads() == 3  # a backward pass takes that of the process
    finally:
        torch.set_num_threads(before)
