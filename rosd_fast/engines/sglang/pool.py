"""The servers that an engine samples on, each with what is known of its state.

A handle is a server of our own, which is started again when it ends or hangs, or one at a given
address, which is left out while it does not answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import stamina

from rosd_fast.engines.sglang.client import Busy, Endpoint, ServerError, Unreachable
from rosd_fast.engines.sglang.process import ManagedServer
from rosd_fast.errors import RunFailed

MISSES = 2  # failed looks at a server's health in a row that mean it hangs
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 5.0  # between two tries
T = TypeVar("T")

logging.getLogger("stamina").setLevel(logging.ERROR)  # whoever asks tells what is tried again


class ServerHandle:
    """One server. `tag` names the weights that it is known to have, None: not known.

    health_every_s: how long an answer may take before the server's health is looked at, and again.
    health_timeout_s: how long such a look may take.
    """

    def __init__(
        self,
        server: ManagedServer | Endpoint,
        *,
        name: str,
        health_every_s: float,
        health_timeout_s: float,
    ) -> None:
        self.own = server if isinstance(server, ManagedServer) else None
        self._given = server if isinstance(server, Endpoint) else None
        self.name = name
        self.tag: str | None = None
        self.down = False
        self.memory_released = False  # its memory is given back
        self.lock = asyncio.Lock()
        self._suspect = self._given is not None  # look at it before it is used
        self._hangs = False
        self._every_s, self._timeout_s = health_every_s, health_timeout_s
        self._look: asyncio.Task[bool] | None = None

    @property
    def url(self) -> str:
        endpoint = self._endpoint
        return self.name if endpoint is None else endpoint.url

    @property
    def num_starts(self) -> int:
        return 0 if self.own is None else self.own.num_starts

    @property
    def num_bytes(self) -> int:
        """Received from the server as it runs now."""
        return 0 if self._endpoint is None else self._endpoint.num_bytes

    async def ensure_up(self) -> bool:
        """Start our own server if it does not run, or hangs; whether it was started.

        Raises Unreachable for a server at an address that does not answer, RunFailed when our own
        cannot be started. Hold `lock`.
        """
        started = False
        if self.own is not None and (not self.own.alive or not await self._trusted()):
            self.tag, self.memory_released = None, False
            await self.own.start()
            started = True
        elif self._given is not None and not await self._trusted():
            self.down = True
            raise Unreachable(self.url, "the server does not answer")
        self._suspect = self._hangs = self.down = False
        return started

    async def post(
        self, path: str, body: dict[str, Any], *, timeout_s: float, watch: bool = False
    ) -> Any:
        """The answer. watch: give up as soon as the server hangs. Raises ServerError."""
        endpoint = self._endpoint
        if endpoint is None:
            raise Unreachable(self.name, "the server does not run")
        if not watch:
            return await endpoint.post(path, body, timeout_s=timeout_s)
        answer = asyncio.create_task(endpoint.post(path, body, timeout_s=timeout_s))
        misses = 0
        try:
            while not answer.done():
                await asyncio.wait({answer}, timeout=self._every_s)
                if answer.done():
                    break
                misses = 0 if await self._healthy() else misses + 1
                if misses >= MISSES and not answer.done():
                    self._hangs = endpoint is self._endpoint  # or was it started anew meanwhile?
                    raise Unreachable(endpoint.url, "the server hangs: it has stopped answering")
            return answer.result()
        finally:
            answer.cancel()

    async def get(self, path: str, *, timeout_s: float) -> Any:
        """The answer. Raises ServerError."""
        endpoint = self._endpoint
        if endpoint is None:
            raise Unreachable(self.name, "the server does not run")
        return await endpoint.get(path, timeout_s=timeout_s)

    def mark_suspect(self) -> None:
        """A request failed: look at the server before it is used again."""
        self._suspect = self.down = True

    def log_hint(self) -> str:
        """Of an error: the server's own words."""
        return "" if self.own is None else f"; its log: {self.own.log_path}"

    async def close(self) -> None:
        if self.own is not None:
            await self.own.stop()
        if self._given is not None:
            await self._given.close()

    @property
    def _endpoint(self) -> Endpoint | None:
        return self._given if self.own is None else self.own.endpoint

    async def _trusted(self) -> bool:
        """Whether it may be used, after a look if need be; learns which weights it has."""
        if not self._suspect:
            return True
        endpoint = self._endpoint
        if self._hangs or endpoint is None or not await self._healthy():
            return False
        try:
            info = await endpoint.get("/model_info", timeout_s=self._timeout_s)
        except ServerError:
            return False
        self.tag = info.get("weight_version")
        return True

    async def _healthy(self) -> bool:
        """One look at a time, shared by all that want to know."""
        if self._look is None or self._look.done():
            self._look = asyncio.create_task(self._ask_health())
        return await asyncio.shield(self._look)

    async def _ask_health(self) -> bool:
        endpoint = self._endpoint
        if endpoint is None:
            return False
        try:
            await endpoint.get("/health", timeout_s=self._timeout_s)
        except ServerError:
            return False
        return True


async def request_with_retries(
    ask: Callable[[ServerHandle, int], Awaitable[T]],
    servers: Sequence[ServerHandle],
    *,
    home: int,
    what: str,
    max_failures: int,
    timeout_s: float,
    failed: Callable[[ServerHandle, ServerError], None],
) -> T:
    """`ask(handle, attempt)` until it succeeds: of the server `home` (modulo their number) first,
    then of the next that is up.

    failed: hears of each failure. what: names the request in an error. Raises RunFailed after
    `max_failures` failures, a busy server not being one, or `timeout_s`; whatever else `ask`
    raises, at once.
    """
    num_failures = 0
    give_up = asyncio.get_running_loop().time() + timeout_s
    async for attempt in stamina.retry_context(
        on=ServerError,
        attempts=None,
        timeout=None,
        wait_initial=FIRST_WAIT_S,
        wait_max=LONGEST_WAIT_S,
    ):
        handle = _choose(servers, home, attempt.num)
        with attempt:
            try:
                return await ask(handle, attempt.num)
            except ServerError as error:
                num_failures += not isinstance(error, Busy)
                failed(handle, error)
                late = asyncio.get_running_loop().time() > give_up
                if late or num_failures >= max_failures:
                    raise RunFailed(
                        f"{what} failed {attempt.num} times in a row, lastly because of "
                        f"{error}{handle.log_hint()}"
                    ) from None
                raise
    raise AssertionError("retries end with a result or an error")


def _choose(servers: Sequence[ServerHandle], home: int, attempt: int) -> ServerHandle:
    up = [handle for handle in servers if not handle.down] or servers
    first = servers[home % len(servers)]
    if attempt == 1 and not first.down:
        return first
    return up[(home + attempt - 1) % len(up)]
