"""Slots: never more than there are, the first queue first, and none is lost to a cancelled task."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from rosd_fast.engines.sglang.slots import Slots


def test_background_waits_until_the_first_queue_is_empty() -> None:
    async def run() -> list[str]:
        slots, order = Slots(1), []

        async def request(name: str) -> None:
            async with slots.take(background=name.startswith("b")):
                order.append(name)
                await asyncio.sleep(0)

        async with asyncio.TaskGroup() as tasks:
            for name in ("b0", "b1", "a0", "b2", "a1"):
                tasks.create_task(request(name))
        return order

    assert asyncio.run(run()) == ["b0", "a0", "a1", "b1", "b2"]


@settings(deadline=None)
@given(
    number=st.integers(1, 3),
    requests=st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=12),
)
def test_cancelled_requests_lose_no_slot(number: int, requests: list[tuple[bool, int]]) -> None:
    """requests: whether in the background, and the turn in which it is cancelled; 0: never."""

    async def run() -> None:
        slots, held, done = Slots(number), 0, 0

        async def request(background: bool) -> None:
            nonlocal held, done
            async with slots.take(background=background):
                held += 1
                assert held <= number
                try:
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
                finally:
                    held -= 1
                done += 1

        tasks = [asyncio.create_task(request(background)) for background, _ in requests]
        for turn in range(1, 7):
            await asyncio.sleep(0)
            for task, (_, cancelled) in zip(tasks, requests, strict=True):
                if cancelled == turn:
                    task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert done >= sum(not cancelled for _, cancelled in requests)
        async with asyncio.timeout(5), asyncio.TaskGroup() as again:  # all slots are free
            barrier = asyncio.Barrier(number)

            async def meet() -> None:
                async with slots.take():
                    await barrier.wait()

            for _ in range(number):
                again.create_task(meet())

    asyncio.run(run())
