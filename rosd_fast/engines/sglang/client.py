"""HTTP client of one server: JSON in, JSON out, and every failure as one of three errors.

    Unreachable   no complete answer arrived (connection refused or reset, truncated JSON, timeout),
                  or the server failed (500, 502, 504)
    Busy          the server is overloaded (429, 503)
    Refused       the request is invalid

The first two are worth a retry. SGLang reports errors in three JSON shapes; `message` reads each.
"""

from __future__ import annotations

import json
from typing import Any

import aiohttp

from rosd_fast.background import in_background
from rosd_fast.engines.sglang.answers import read_json

BUSY, BROKEN = {429, 503}, {500, 502, 504}
MAX_MESSAGE = 300  # characters of an error message that are shown
CONNECT_S = 10.0
LARGE_BYTES = 2**16  # answers from this size on are read in a thread


class ServerError(Exception):
    """A request to the server at `url` failed.

    url: base address of the server.
    what: what went wrong, in one line.
    """

    def __init__(self, url: str, what: str) -> None:
        self.url, self.what = url, what
        super().__init__(f"{url}: {what}")


class Unreachable(ServerError):
    """No complete answer arrived; retry."""


class Busy(ServerError):
    """Temporarily overloaded (429, 503); retry."""


class Refused(ServerError):
    """Rejected the request; a retry would fail too."""


class Endpoint:
    """A server's base address and the connection to it. Call `close` when done.

    url: base address, without a trailing slash.
    api_key: sent as a bearer token; None: no key.
    num_bytes: number of bytes received.
    """

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._session: aiohttp.ClientSession | None = None
        self._closed = False
        self.num_bytes = 0

    async def post(self, path: str, body: dict[str, Any], *, timeout_s: float) -> Any:
        """Return the answer to `body`. Raises Unreachable, Busy or Refused."""
        return await self._request("POST", path, body, timeout_s)

    async def get(self, path: str, *, timeout_s: float) -> Any:
        """Return the answer, None if it is empty. Raises Unreachable, Busy or Refused."""
        return await self._request("GET", path, None, timeout_s)

    async def close(self) -> None:
        """End all requests; later ones raise Unreachable."""
        self._closed = True
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _request(self, method: str, path: str, body: Any, timeout_s: float) -> Any:
        if self._closed:
            raise Unreachable(self.url, "the server was stopped")
        try:
            async with self._open_session().request(
                method,
                self.url + path,
                json=body,
                timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_S),
            ) as response:
                data = await response.read()
                status = response.status
        except TimeoutError:
            raise Unreachable(self.url, f"no answer to {path} within {timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            what = str(error) or type(error).__name__
            raise Unreachable(self.url, f"the connection failed at {path} ({what})") from None
        self.num_bytes += len(data)
        if status in BUSY:
            raise Busy(self.url, f"{path} answered {status} ({message(data)})")
        if status in BROKEN:
            raise Unreachable(self.url, f"{path} answered {status} ({message(data)})")
        if status != 200:
            raise Refused(self.url, f"{path} answered {status} ({message(data)})")
        if not data.strip():
            return None
        try:
            if len(data) < LARGE_BYTES:
                return read_json(data)
            return await in_background(read_json, data)
        except ValueError:
            raise Unreachable(self.url, f"the answer to {path} is not complete JSON") from None

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            # No limit here, since the engine bounds its requests. No keep-alive, since a kept
            # connection would not survive a restart of the server.
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
            self._session = aiohttp.ClientSession(
                connector=connector, headers=self._headers, read_bufsize=2**20
            )
        return self._session


def message(data: bytes) -> str:
    """The message in the body of an error, in one short line."""
    text = data.decode(errors="replace")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if isinstance(value, dict):
        keys = ("error", "message", "error_message")
        value = next((value[key] for key in keys if key in value), value)
    if isinstance(value, dict):
        value = value.get("message", value)
    return " ".join(str(value).split())[:MAX_MESSAGE] or "no message"
