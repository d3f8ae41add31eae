"""One server's HTTP API: JSON in, JSON out, and every failure as one of three errors.

    Unreachable   no whole answer came: refused, reset in mid-body, cut JSON, too long a wait, or
                  the server broke: 500, 502, 504
    Busy          the server says so: 429, 503
    Refused       the request is wrong, and will be next time

The first two are worth another try. SGLang reports errors in three shapes; `message` reads each.
"""

from __future__ import annotations

import json
from typing import Any

import aiohttp

BUSY, BROKEN = {429, 503}, {500, 502, 504}
MAX_MESSAGE = 300  # characters of an error that are shown
CONNECT_S = 10.0


class ServerError(Exception):
    """Something went wrong between us and `url`."""

    def __init__(self, url: str, what: str) -> None:
        self.url, self.what = url, what
        super().__init__(f"{url}: {what}")


class Unreachable(ServerError):
    """No whole answer came."""


class Busy(ServerError):
    """The server cannot now."""


class Refused(ServerError):
    """The server will not."""


class Endpoint:
    """Base address of a server and how to talk to it. Use `close` when done.

    api_key: sent as a bearer token, None: no key.
    """

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._session: aiohttp.ClientSession | None = None
        self._closed = False
        self.num_bytes = 0  # received

    async def post(self, path: str, body: dict[str, Any], *, timeout_s: float) -> Any:
        """The answer to `body`. Raises Unreachable, Busy or Refused."""
        return await self._ask("POST", path, body, timeout_s)

    async def get(self, path: str, *, timeout_s: float) -> Any:
        """The answer; None where it is empty. Raises Unreachable, Busy or Refused."""
        return await self._ask("GET", path, None, timeout_s)

    async def close(self) -> None:
        """End all requests; later ones are Unreachable."""
        self._closed = True
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _ask(self, method: str, path: str, body: Any, timeout_s: float) -> Any:
        if self._closed:
            raise Unreachable(self.url, "the server was stopped")
        try:
            async with self._open().request(
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
            return json.loads(data)
        except ValueError:
            raise Unreachable(self.url, f"the answer to {path} is no whole JSON text") from None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            # No limit here: the engine bounds its requests. No keep-alive across a restart.
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
            self._session = aiohttp.ClientSession(
                connector=connector, headers=self._headers, read_bufsize=2**20
            )
        return self._session


def message(data: bytes) -> str:
    """What an error's body says, in one short line."""
    text = data.decode(errors="replace")
    try:
        found = json.loads(text)
    except ValueError:
        found = text
    if isinstance(found, dict):
        found = found.get("error", found.get("message", found))
    if isinstance(found, dict):
        found = found.get("message", found)
    return " ".join(str(found).split())[:MAX_MESSAGE] or "no message"
