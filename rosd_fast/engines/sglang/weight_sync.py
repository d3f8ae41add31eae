"""Weight sync: how the trainer's weights reach the servers.

    disk          a model folder that the servers read (`weight_folder.py`)
    distributed   broadcast from memory, in buckets, over a process group of trainer and server
                  (`broadcast_sync.py`)
    adapter       LoRA adapters alone, through a folder (`adapter_sync.py`)

In all cases a server reports a weight version only after it has loaded all of that version. Weights
come as a stream (`rosd_fast.model.weight_stream`): no more than a few buckets are in memory at a
time.

The endpoints are those of SGLang 0.5.23: `entrypoints/http_server.py`, with the fields of their
bodies in `managers/io_struct.py` (docs.sglang.io/advanced_features/sglang_for_rl.html).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from rosd_fast.engines.sglang.client import Refused, Unreachable
from rosd_fast.engines.sglang.pool import ServerHandle
from rosd_fast.engines.sglang.weight_folder import WeightFolder
from rosd_fast.model.weight_stream import WeightStream

SYNC_TIMEOUT_S = 600.0


class WeightSync(ABC):
    """Holds copies of weights and sends them to servers, again after a restart."""

    @abstractmethod
    def stage(self, weights: WeightStream, version: int) -> None:
        """Copy `weights`, while servers still get the version before. Raises UserError when that
        fails. Runs in a thread."""

    @abstractmethod
    async def push(self, handle: ServerHandle, tag: str, version: int) -> None:
        """Load the weights of a staged version into a server under the name `tag` and flush its KV
        cache.

        Hold the handle's lock. Raises ServerError.
        """

    def request_fields(self, tag: str) -> dict[str, Any]:
        """The fields of a /generate request that is sampled with the weights of that name."""
        return {}

    def version_on(self, handle: ServerHandle, tag: str) -> str:
        """The version that a server names in its answers when it has the weights `tag`."""
        return tag

    def are_lost(self, error: Refused) -> bool:
        """Whether a server refused a request because it lost the weights, as after a restart."""
        return False

    @abstractmethod
    def discard_stale(self) -> None:
        """Remove all but the version that was staged last, once servers need no other."""

    @abstractmethod
    async def close(self) -> None:
        """Remove all versions and leave all process groups."""


class DiskSync(WeightSync):
    """Weight sync by a model folder that the servers read.

    folder: gets one folder per version.
    model_folder: has the model's config and tokenizer files.
    """

    def __init__(self, folder: Path, model_folder: Path) -> None:
        self._folder = WeightFolder(folder, model_folder)
        self._version = 0

    def stage(self, weights: WeightStream, version: int) -> None:
        self._folder.write(weights, version)
        self._version = version

    async def push(self, handle: ServerHandle, tag: str, version: int) -> None:
        await post_checked(
            handle,
            "/update_weights_from_disk",
            {
                "model_path": str(self._folder.path(version)),
                "weight_version": tag,
                "flush_cache": True,
            },
            what="load the weights",
        )

    def discard_stale(self) -> None:
        self._folder.drop_all_but(self._version)

    async def close(self) -> None:
        self._folder.drop_all_but(None)


async def post_checked(
    handle: ServerHandle,
    path: str,
    body: dict[str, Any],
    *,
    what: str,
    timeout_s: float = SYNC_TIMEOUT_S,
) -> None:
    """POST `body` and require that the server reports success. Raises ServerError."""
    try:
        answer = await handle.post(path, body, timeout_s=timeout_s)
    except Refused as error:
        raise Unreachable(handle.url, f"did not {what} ({error.what})") from None
    if not (isinstance(answer, dict) and answer.get("success")):
        reason = answer.get("message", answer) if isinstance(answer, dict) else answer
        raise Unreachable(handle.url, f"did not {what} ({reason})")
