"""Weight sync: how the trainer's weights reach the servers.

    disk          a model folder that the servers read (`weight_folder.py`)
    distributed   broadcast from memory, in buckets, over a process group of trainer and server
    adapter       LoRA adapters alone, through a folder (`adapter_sync.py`)

In all cases a server reports a weight version only after it has loaded all of that version.

The endpoints are those of SGLang 0.5.23: `entrypoints/http_server.py`, with the fields of their
bodies in `managers/io_struct.py` (docs.sglang.io/advanced_features/sglang_for_rl.html). The layout
of a bucket is that of `model_executor/model_runner_components/weight_updater.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed
from torch import Tensor

from rosd_fast.engines.sglang.client import Refused, ServerError, Unreachable
from rosd_fast.engines.sglang.pool import ServerHandle
from rosd_fast.engines.sglang.weight_folder import WeightFolder, distinct
from rosd_fast.errors import RunFailed, UserError

SYNC_TIMEOUT_S = 600.0
GROUP_TIMEOUT_S = 120.0  # for joining a group, and for each bucket
LEAVE_TIMEOUT_S = 10.0
BROADCAST_POLL_S = 0.002
BUCKET_BYTES = 512 * 2**20
NamedTensor = tuple[str, Tensor]
T = TypeVar("T")
c10d: Any = torch.distributed  # its stores and groups are not typed


class WeightSync(ABC):
    """Holds a copy of one version's weights and sends it to servers, again after a restart."""

    @abstractmethod
    def stage(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Copy `weights`, which servers get from now on. Raises UserError when that fails."""

    @abstractmethod
    async def push(self, handle: ServerHandle, tag: str) -> None:
        """Load the staged weights into a server under the name `tag` and flush its KV cache.

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
        """Remove older versions, once every server has the staged one."""

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

    def stage(self, weights: Mapping[str, Tensor], version: int) -> None:
        self._folder.write(weights, version)
        self._version = version

    async def push(self, handle: ServerHandle, tag: str) -> None:
        await post_checked(
            handle,
            "/update_weights_from_disk",
            {
                "model_path": str(self._folder.path(self._version)),
                "weight_version": tag,
                "flush_cache": True,
            },
            what="load the weights",
        )

    def discard_stale(self) -> None:
        self._folder.drop_all_but(self._version)

    async def close(self) -> None:
        self._folder.drop_all_but(None)


class DistributedSync(WeightSync):
    """Weight sync by broadcast, with NCCL between GPUs and gloo otherwise.

    host: address of this machine that it listens on and at which the servers reach it.
    bucket_bytes: size of one broadcast; trainer and server need as much memory beside the weights.
    """

    def __init__(self, *, host: str = "127.0.0.1", bucket_bytes: int = BUCKET_BYTES) -> None:
        self.host, self.bucket_bytes = host, bucket_bytes
        self._weights: list[NamedTensor] = []
        self._on_gpu = False
        self._groups: dict[ServerHandle, _Group] = {}

    def stage(self, weights: Mapping[str, Tensor], version: int) -> None:
        self._on_gpu = any(tensor.is_cuda for tensor in weights.values())
        originals = {tensor.data_ptr() for tensor in weights.values()}
        copies = [
            (name, tensor.clone() if tensor.data_ptr() in originals else tensor)
            for name, tensor in distinct(weights).items()
        ]
        # Large items first, so that tensors of a bucket are aligned to their item size.
        self._weights = sorted(copies, key=lambda item: -item[1].itemsize)

    async def push(self, handle: ServerHandle, tag: str) -> None:
        group = self._groups.pop(handle, None)
        if group is not None:
            try:
                await self._send(handle, group, tag)
            except ServerError:  # the server may have restarted: join it again
                await group.leave()
            else:
                self._groups[handle] = group
                return
        group = await _join(handle, self.host, on_gpu=self._on_gpu)
        try:
            await self._send(handle, group, tag)
        except ServerError:
            await group.leave()
            raise
        self._groups[handle] = group

    def discard_stale(self) -> None:
        pass  # only one version is held

    async def close(self) -> None:
        await asyncio.gather(*(group.leave() for group in self._groups.values()))
        self._groups.clear()
        self._weights = []

    async def _send(self, handle: ServerHandle, group: _Group, tag: str) -> None:
        await self._begin(handle)
        parts = buckets(self._weights, self.bucket_bytes)
        for index, bucket in enumerate(parts):
            last = index == len(parts) - 1
            body = {
                "names": [name for name, _ in bucket],
                "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
                "shapes": [list(tensor.shape) for _, tensor in bucket],
                "group_name": group.name,
                "load_format": "flattened_bucket",
                # Until the last bucket the server has mixed weights.
                "weight_version": tag if last else f"{tag}-partial",
                "flush_cache": last,
            }
            flat = torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in bucket])
            await group.broadcast(
                flat,
                post_checked(
                    handle,
                    "/update_weights_from_distributed",
                    body,
                    what="take the weights",
                ),
            )
        await post_checked(handle, "/end_weight_update", {}, what="end a weight update")

    async def _begin(self, handle: ServerHandle) -> None:
        """Begin a weight update; first end one that was interrupted."""
        try:
            await post_checked(handle, "/begin_weight_update", {}, what="begin a weight update")
        except ServerError:
            await post_checked(handle, "/end_weight_update", {}, what="end a weight update")
            await post_checked(handle, "/begin_weight_update", {}, what="begin a weight update")


def buckets(weights: Sequence[NamedTensor], limit: int) -> list[list[NamedTensor]]:
    """Split `weights`, in order, into parts of at most `limit` bytes; a larger tensor is alone."""
    parts: list[list[NamedTensor]] = []
    room = 0
    for name, tensor in weights:
        if not parts or tensor.nbytes > room:
            parts.append([])
            room = limit
        parts[-1].append((name, tensor))
        room -= tensor.nbytes
    return parts


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


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """The process group of the trainer, which is rank 0, and the ranks of one server."""

    name: str
    handle: ServerHandle
    process_group: Any  # ProcessGroupGloo or ProcessGroupNCCL
    device: torch.device
    store: Any  # must live as long as the group

    async def broadcast(self, flat: Tensor, receive: Coroutine[Any, Any, None]) -> None:
        """Send `flat` while awaiting `receive`, the request to the server. Raises ServerError."""
        request = asyncio.ensure_future(receive)
        flat = flat.to(self.device)
        work = self.process_group.broadcast(flat, 0)
        try:
            while not (work.is_completed() and request.done()):
                if request.done():
                    if request.exception() is not None:
                        break  # the server will not receive
                    await asyncio.sleep(BROADCAST_POLL_S)
                else:
                    if work.is_completed():
                        work.wait()  # raises if it failed: then the server may never answer
                    await asyncio.wait({request}, timeout=BROADCAST_POLL_S)
            await request
            work.wait()
            if flat.is_cuda:
                torch.cuda.synchronize()
        except RuntimeError as error:  # from the process group
            reason = str(error).splitlines()[0]
            raise Unreachable(self.handle.url, f"the weights did not arrive ({reason})") from None
        finally:
            request.cancel()
            with contextlib.suppress(asyncio.CancelledError, ServerError):
                await request

    async def leave(self) -> None:
        """Close the group on the server's side, which makes pending broadcasts here fail."""
        with contextlib.suppress(ServerError):
            await self.handle.post(
                "/destroy_weights_update_group",
                {"group_name": self.name},
                timeout_s=LEAVE_TIMEOUT_S,
            )


async def _join(handle: ServerHandle, host: str, *, on_gpu: bool) -> _Group:
    """Open a process group with a server. Raises ServerError, or RunFailed for data parallelism."""
    info = await handle.get("/server_info", timeout_s=GROUP_TIMEOUT_S)
    for name in ("dp_size", "pp_size"):
        if info.get(name, 1) != 1:
            raise RunFailed(
                f"{handle.url}: engine.sync distributed supports only tensor parallelism, but this "
                f"server has {name} {info[name]}; set engine.sync = disk"
            )
    size = 1 + info.get("tp_size", 1)
    nccl = on_gpu and info.get("device") == "cuda"
    name = f"rosd-{secrets.token_hex(4)}"
    listener = _listen(host)
    port = listener.getsockname()[1]
    timeout = timedelta(seconds=GROUP_TIMEOUT_S)
    store = c10d.TCPStore(
        host,
        port,
        size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    device = torch.device("cuda" if nccl else "cpu")
    joined = asyncio.ensure_future(
        post_checked(
            handle,
            "/init_weights_update_group",
            {
                "master_address": host,
                "master_port": port,
                "rank_offset": 1,
                "world_size": size,
                "group_name": name,
                "backend": "nccl" if nccl else "gloo",
            },
            what="join the trainer's process group",
            timeout_s=GROUP_TIMEOUT_S,
        )
    )
    opened = asyncio.ensure_future(
        _in_daemon_thread(lambda: _open(store, name, size, host, timeout, nccl=nccl))
    )
    try:
        await joined
        return _Group(name, handle, await opened, device, store)
    except RuntimeError as error:  # from torch.distributed
        reason = str(error).splitlines()[0]
        raise Unreachable(handle.url, f"no process group with the server ({reason})") from None
    finally:
        joined.cancel()
        opened.cancel()


def _open(store: Any, name: str, size: int, host: str, timeout: timedelta, *, nccl: bool) -> Any:
    """Open the trainer's rank of a group that the server opens under `name`.

    The prefixes of the keys are those of `init_custom_process_group` in SGLang's `utils/common.py`
    and of torch.distributed, which it calls.
    """
    scope = c10d.PrefixStore(f"{name}/", c10d.PrefixStore(name, store))
    scope = c10d.PrefixStore("cuda/" if nccl else "cpu/", scope)
    if nccl:
        options = c10d.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return c10d.ProcessGroupNCCL(scope, 0, size, options)
    return c10d.ProcessGroupGloo(scope, 0, size, gloo_options(host, timeout))


def gloo_options(host: str, timeout: timedelta) -> Any:
    """Options of a gloo group that listens only on `host`."""
    options = c10d.ProcessGroupGloo._Options()
    options._devices = [c10d.ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timeout
    return options


async def _in_daemon_thread(call: Callable[[], T]) -> T:
    """Run `call` in a thread that does not keep the program from exiting; return its result."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: Exception | None) -> None:
        if future.done():  # cancelled
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(cast(T, result))

    def work() -> None:
        outcome: tuple[T | None, Exception | None]
        try:
            outcome = call(), None
        except Exception as error:
            outcome = None, error
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=work, daemon=True).start()
    return await future


def _listen(host: str) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, 0), family=family)
    except OSError as error:
        raise UserError(
            f"is not an address of this machine ({error.strerror or error})",
            where=f"engine.sync_host: {host}",
            fix="Give the address at which the servers reach this machine",
        ) from None
