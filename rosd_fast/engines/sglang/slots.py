"""Slots for requests in flight; those that a step waits for get the next free slot first."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Slots:
    """A semaphore with two queues, of which the second waits until the first is empty.

    number: how many slots there are.
    """

    def __init__(self, number: int) -> None:
        self._free = number  # above 0 only while nothing waits
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._background: deque[asyncio.Future[None]] = deque()

    @asynccontextmanager
    async def take(self, *, background: bool = False) -> AsyncIterator[None]:
        """Hold a slot during the block. background: wait in the second queue."""
        await self._acquire(self._background if background else self._waiting)
        try:
            yield
        finally:
            self._release()

    async def _acquire(self, queue: deque[asyncio.Future[None]]) -> None:
        if self._free:
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it has the slot already
                self._release()
            raise

    def _release(self) -> None:
        """Hand the slot to the next that waits, past those that were cancelled."""
        for queue in (self._waiting, self._background):
            while queue:
                turn = queue.popleft()
                if not turn.done():
                    turn.set_result(None)
                    return
        self._free += 1
