"""The weights that servers have by themselves: nothing is sent, and they must not change.

For evaluations of a model that a server has loaded. A server is not told anything, so several
evaluations, and other clients, may use it at the same time.
"""

from __future__ import annotations

from typing import Any

from rosd_fast.engines.sglang.client import Unreachable
from rosd_fast.engines.sglang.pool import ServerHandle
from rosd_fast.engines.sglang.weight_sync import SYNC_TIMEOUT_S, WeightSync
from rosd_fast.model.weight_stream import WeightStream


class ServedWeights(WeightSync):
    """The sync of an engine whose servers keep their weights."""

    def __init__(self) -> None:
        self._versions: dict[ServerHandle, str] = {}

    def stage(self, weights: WeightStream, version: int) -> None:
        raise ValueError("servers that keep their weights get none")

    async def push(self, handle: ServerHandle, tag: str, version: int) -> None:
        """Note the version that the server has. Raises ServerError."""
        info: Any = await handle.get("/model_info", timeout_s=SYNC_TIMEOUT_S)
        if not isinstance(info, dict) or "weight_version" not in info:
            raise Unreachable(handle.url, "does not say which weights it has")
        self._versions[handle] = info["weight_version"]

    def version_on(self, handle: ServerHandle, tag: str) -> str:
        return self._versions.get(handle, tag)

    def discard_stale(self) -> None:
        """Do nothing: there is only one version."""

    async def close(self) -> None:
        """Do nothing: nothing was written."""
