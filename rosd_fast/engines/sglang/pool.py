"""The servers that an engine uses, each with its known state, and requests with retries.

A server is either managed, so that it is restarted when it exits or hangs, or remote at a given
address, so that it is left out while it does not answer.
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

MAX_FAILED_CHECKS = 2  # failed health checks in a row after which a server counts as hung
FIRST_WAIT_S, MAX_WAIT_S = 0.2, 5.0  # between two tries
T = TypeVar("T")

logging.getLogger("stamina").setLevel(logging.ERROR)  # the engine itself reports retries


class ServerHandle:
    """One server and what is known of its state.

    managed: the server process; None for a remote server.
    name: shown to the user.
    tag: name of the weights that the server is known to have; None: not known.
    down: whether a request failed and the server has not been found healthy since.
    memory_released: whether its device memory is released.
    lock: held while the server is started or gets weights.
    health_every_s: interval of health checks on a pending request.
    health_timeout_s: timeout of a health check.
    """

    def __init__(
        self,
        server: ManagedServer | Endpoint,
        *,
        name: str,
        health_every_s: float,
        health_timeout_s: float,
    ) -> None:
        self.managed = server if isinstance(server, ManagedServer) else None
        self._remote = server if isinstance(server, Endpoint) else None
        self.name = name
        self.tag: str | None = None
        self.down = False
        self.memory_released = False
        self.lock = asyncio.Lock()
        self._suspect = self._remote is not None  # check its health before the next use
        self._hangs = False
        self._health_every_s, self._health_timeout_s = health_every_s, health_timeout_s
        self._health_check: asyncio.Task[bool] | None = None

    @property
    def url(self) -> str:
        endpoint = self._endpoint
        return self.name if endpoint is None else endpoint.url

    @property
    def num_starts(self) -> int:
        return 0 if self.managed is None else self.managed.num_starts

    @property
    def num_bytes(self) -> int:
        """The number of bytes received from the server since its last start."""
        return 0 if self._endpoint is None else self._endpoint.num_bytes

    async def ensure_up(self) -> bool:
        """Start a managed server that does not run or hangs; return whether it was started.

        Raises Unreachable for a remote server that does not answer, RunFailed when a managed server
        cannot be started. Hold `lock`.
        """
        started = False
        if self.managed is not None and (not self.managed.alive or not await self._trusted()):
            self.tag, self.memory_released = None, False
            await self.managed.start()
            started = True
        elif self._remote is not None and not await self._trusted():
            self.down = True
            raise Unreachable(self.url, "the server does not answer")
        self._suspect = self._hangs = self.down = False
        return started

    async def post(
        self, path: str, body: dict[str, Any], *, timeout_s: float, watch: bool = False
    ) -> Any:
        """Return the answer. watch: give up as soon as the server hangs. Raises ServerError."""
        endpoint = self._endpoint
        if endpoint is None:
            raise Unreachable(self.name, "the server is not running")
        if not watch:
            return await endpoint.post(path, body, timeout_s=timeout_s)
        answer = asyncio.create_task(endpoint.post(path, body, timeout_s=timeout_s))
        failed_checks = 0
        try:
            while not answer.done():
                await asyncio.wait({answer}, timeout=self._health_every_s)
                if answer.done():
                    break
                failed_checks = 0 if await self._healthy() else failed_checks + 1
                if failed_checks >= MAX_FAILED_CHECKS and not answer.done():
                    self._hangs = endpoint is self._endpoint  # unless restarted in the meantime
                    raise Unreachable(endpoint.url, "the server hangs: it has stopped answering")
            return answer.result()
        finally:
            answer.cancel()

    async def get(self, path: str, *, timeout_s: float) -> Any:
        """Return the answer. Raises ServerError."""
        endpoint = self._endpoint
        if endpoint is None:
            raise Unreachable(self.name, "the server is not running")
        return await endpoint.get(path, timeout_s=timeout_s)

    def mark_suspect(self) -> None:
        """Note that a request failed: the server's health is checked before its next use."""
        self._suspect = self.down = True

    def log_hint(self) -> str:
        """A suffix for error messages that points at the server's log; empty for a remote one."""
        return "" if self.managed is None else f"; its log: {self.managed.log_path}"

    async def close(self) -> None:
        """Stop a managed server; close the connection to a remote one."""
        if self.managed is not None:
            await self.managed.stop()
        if self._remote is not None:
            await self._remote.close()

    @property
    def _endpoint(self) -> Endpoint | None:
        return self._remote if self.managed is None else self.managed.endpoint

    async def _trusted(self) -> bool:
        """Whether the server may be used. For a suspect one, checks its health and reads `tag`."""
        if not self._suspect:
            return True
        endpoint = self._endpoint
        if self._hangs or endpoint is None or not await self._healthy():
            return False
        try:
            info = await endpoint.get("/model_info", timeout_s=self._health_timeout_s)
        except ServerError:
            return False
        self.tag = info.get("weight_version")
        return True

    async def _healthy(self) -> bool:
        """Return the result of a health check, which concurrent callers share."""
        if self._health_check is None or self._health_check.done():
            self._health_check = asyncio.create_task(self._request_health())
        return await asyncio.shield(self._health_check)

    async def _request_health(self) -> bool:
        endpoint = self._endpoint
        if endpoint is None:
            return False
        try:
            await endpoint.get("/health", timeout_s=self._health_timeout_s)
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
    """Call `ask(handle, attempt)` until it succeeds and return its result.

    home: index, modulo the number of servers, of the server that is asked first. Retries go to the
        following servers that are up.
    what: names the request in an error message.
    failed: called after each failure.

    Raises RunFailed after `max_failures` failures, not counting busy servers, or after `timeout_s`.
    Exceptions other than ServerError are not retried.
    """
    num_failures = 0
    deadline = asyncio.get_running_loop().time() + timeout_s
    async for attempt in stamina.retry_context(
        on=ServerError,
        attempts=None,
        timeout=None,
        wait_initial=FIRST_WAIT_S,
        wait_max=MAX_WAIT_S,
    ):
        handle = _choose(servers, home, attempt.num)
        with attempt:
            try:
                return await ask(handle, attempt.num)
            except ServerError as error:
                num_failures += not isinstance(error, Busy)
                failed(handle, error)
                late = asyncio.get_running_loop().time() > deadline
                if late or num_failures >= max_failures:
                    raise RunFailed(
                        f"{what} failed {attempt.num} times in a row, most recently because of "
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
