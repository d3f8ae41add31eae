"""How the trainer's weights reach a server.

    disk          a model folder that the servers read (`weight_folder.py`)
    distributed   broadcast from memory, in buckets, over a process group of trainer and server

Whatever the way, a server carries a version's name only once it has all of its weights.
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
GROUP_TIMEOUT_S = 120.0  # to join a group, and for each bucket
LEAVE_TIMEOUT_S = 10.0
POLL_S = 0.002  # between looks at what is being sent
BUCKET_BYTES = 512 * 2**20
Named = tuple[str, Tensor]
T = TypeVar("T")
c10d: Any = torch.distributed  # type checkers do not see its stores and groups


class WeightSync(ABC):
    """Keeps the weights of one version and hands them to servers, now or when one starts again."""

    @abstractmethod
    def keep(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Copy `weights`: what servers get from now on. Raises UserError when they find no room."""

    @abstractmethod
    async def push(self, handle: ServerHandle, tag: str) -> None:
        """Have a server take the kept weights under the name `tag`, and empty its cache.

        Hold the handle's lock. Raises ServerError.
        """

    @abstractmethod
    def discard_stale(self) -> None:
        """Every server has the kept version: drop the others."""

    @abstractmethod
    async def close(self) -> None:
        """Drop everything."""


class DiskSync(WeightSync):
    """By a folder of `folder` for each version. model_folder: the model's config and tokenizer."""

    def __init__(self, folder: Path, model_folder: Path) -> None:
        self._folder = WeightFolder(folder, model_folder)
        self._version = 0

    def keep(self, weights: Mapping[str, Tensor], version: int) -> None:
        self._folder.write(weights, version)
        self._version = version

    async def push(self, handle: ServerHandle, tag: str) -> None:
        await ask(
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
    """By broadcast, with NCCL between GPUs and gloo otherwise.

    host: address of this machine under which the servers reach it, and which it listens on.
    bucket_bytes: sent at once; so much memory is needed beside the weights, here and there.
    """

    def __init__(self, *, host: str = "127.0.0.1", bucket_bytes: int = BUCKET_BYTES) -> None:
        self.host, self.bucket_bytes = host, bucket_bytes
        self._weights: list[Named] = []
        self._on_gpu = False
        self._groups: dict[ServerHandle, _Group] = {}

    def keep(self, weights: Mapping[str, Tensor], version: int) -> None:
        self._on_gpu = any(tensor.is_cuda for tensor in weights.values())
        own = {tensor.data_ptr() for tensor in weights.values()}
        copies = [
            (name, tensor.clone() if tensor.data_ptr() in own else tensor)
            for name, tensor in distinct(weights).items()
        ]
        # A bucket's tensors stand at multiples of their item size when large items come first.
        self._weights = sorted(copies, key=lambda item: -item[1].itemsize)

    async def push(self, handle: ServerHandle, tag: str) -> None:
        group = self._groups.pop(handle, None)
        if group is not None:
            try:
                await self._send(handle, group, tag)
            except ServerError:  # the server may have been started again since: join it anew
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
        pass  # there is one version only

    async def close(self) -> None:
        await asyncio.gather(*(group.leave() for group in self._groups.values()))
        self._groups.clear()
        self._weights = []

    async def _send(self, handle: ServerHandle, group: _Group, tag: str) -> None:
        await self._begin(handle)
        pieces = buckets(self._weights, self.bucket_bytes)
        for index, bucket in enumerate(pieces):
            last = index == len(pieces) - 1
            body = {
                "names": [name for name, _ in bucket],
                "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
                "shapes": [list(tensor.shape) for _, tensor in bucket],
                "group_name": group.name,
                "load_format": "flattened_bucket",
                # Mixed weights are of no version.
                "weight_version": tag if last else f"{tag}-partial",
                "flush_cache": last,
            }
            flat = torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in bucket])
            await group.broadcast(
                flat,
                ask(
                    handle,
                    "/update_weights_from_distributed",
                    body,
                    what="take the weights",
                ),
            )
        await ask(handle, "/end_weight_update", {}, what="end a hand-over")

    async def _begin(self, handle: ServerHandle) -> None:
        """Open a hand-over; end one that broke off."""
        try:
            await ask(handle, "/begin_weight_update", {}, what="begin a hand-over")
        except ServerError:
            await ask(handle, "/end_weight_update", {}, what="end a hand-over")
            await ask(handle, "/begin_weight_update", {}, what="begin a hand-over")


def buckets(weights: Sequence[Named], limit: int) -> list[list[Named]]:
    """`weights` in order, cut into parts of at most `limit` bytes, a larger tensor by itself."""
    found: list[list[Named]] = []
    room = 0
    for name, tensor in weights:
        if not found or tensor.nbytes > room:
            found.append([])
            room = limit
        found[-1].append((name, tensor))
        room -= tensor.nbytes
    return found


async def ask(
    handle: ServerHandle,
    path: str,
    body: dict[str, Any],
    *,
    what: str,
    timeout_s: float = SYNC_TIMEOUT_S,
) -> None:
    """POST, and have the server say that it did. Raises ServerError."""
    try:
        answer = await handle.post(path, body, timeout_s=timeout_s)
    except Refused as error:
        raise Unreachable(handle.url, f"did not {what} ({error.what})") from None
    if not (isinstance(answer, dict) and answer.get("success")):
        said = answer.get("message", answer) if isinstance(answer, dict) else answer
        raise Unreachable(handle.url, f"did not {what} ({said})")


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """The trainer, rank 0, and the ranks of one server."""

    name: str
    handle: ServerHandle
    process_group: Any  # ProcessGroupGloo or ProcessGroupNCCL
    device: torch.device
    store: Any  # lives as long as the group

    async def broadcast(self, flat: Tensor, received: Coroutine[Any, Any, None]) -> None:
        """Send `flat` while `received`, the server's side, is awaited. Raises ServerError."""
        asked = asyncio.ensure_future(received)
        flat = flat.to(self.device)
        work = self.process_group.broadcast(flat, 0)
        try:
            while not (work.is_completed() and asked.done()):
                if asked.done():
                    if asked.exception() is not None:
                        break  # nobody will receive
                    await asyncio.sleep(POLL_S)
                else:
                    if work.is_completed():
                        work.wait()  # raises if it failed, when the server may never answer
                    await asyncio.wait({asked}, timeout=POLL_S)
            await asked
            work.wait()
            if flat.is_cuda:
                torch.cuda.synchronize()
        except RuntimeError as error:  # of the process group
            said = str(error).splitlines()[0]
            raise Unreachable(self.handle.url, f"the weights did not arrive ({said})") from None
        finally:
            asked.cancel()
            with contextlib.suppress(asyncio.CancelledError, ServerError):
                await asked

    async def leave(self) -> None:
        """End the group. The server's end goes first: what we still send fails with it."""
        with contextlib.suppress(ServerError):
            await self.handle.post(
                "/destroy_weights_update_group",
                {"group_name": self.name},
                timeout_s=LEAVE_TIMEOUT_S,
            )


async def _join(handle: ServerHandle, host: str, *, on_gpu: bool) -> _Group:
    """A process group with a server. Raises ServerError."""
    info = await handle.get("/server_info", timeout_s=GROUP_TIMEOUT_S)
    for name in ("dp_size", "pp_size"):
        if info.get(name, 1) != 1:
            raise RunFailed(
                f"{handle.url}: engine.sync distributed knows tensor parallelism only, and this "
                f"server has {name} {info[name]}; set engine.sync = disk"
            )
    size = 1 + info.get("tp_size", 1)
    nccl = on_gpu and info.get("device") == "cuda"
    name = f"rosd-{secrets.token_hex(4)}"
    listening = _listen(host)
    port = listening.getsockname()[1]
    timeout = timedelta(seconds=GROUP_TIMEOUT_S)
    store = c10d.TCPStore(
        host,
        port,
        size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )
    device = torch.device("cuda" if nccl else "cpu")
    joined = asyncio.ensure_future(
        ask(
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
        _unwaited(lambda: _open(store, name, size, host, timeout, nccl=nccl))
    )
    try:
        await joined
        return _Group(name, handle, await opened, device, store)
    except RuntimeError as error:  # of torch.distributed
        said = str(error).splitlines()[0]
        raise Unreachable(handle.url, f"no process group with the server ({said})") from None
    finally:
        joined.cancel()
        opened.cancel()


def _open(store: Any, name: str, size: int, host: str, timeout: timedelta, *, nccl: bool) -> Any:
    """Our rank of a group that torch.distributed opens under `name` on the other side, which puts
    these prefixes before its keys."""
    scope = c10d.PrefixStore(f"{name}/", c10d.PrefixStore(name, store))
    scope = c10d.PrefixStore("cuda/" if nccl else "cpu/", scope)
    if nccl:
        options = c10d.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return c10d.ProcessGroupNCCL(scope, 0, size, options)
    return c10d.ProcessGroupGloo(scope, 0, size, gloo_options(host, timeout))


def gloo_options(host: str, timeout: timedelta) -> Any:
    """Listen at `host` only."""
    options = c10d.ProcessGroupGloo._Options()
    options._devices = [c10d.ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timeout
    return options


async def _unwaited(call: Callable[[], T]) -> T:
    """`call()` in a thread that the program's end does not wait for."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: Exception | None) -> None:
        if future.done():  # given up
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
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=work, daemon=True).start()
    return await future


def _listen(host: str) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, 0), family=family)
    except OSError as error:
        raise UserError(
            f"is no address of this machine ({error.strerror or error})",
            where=f"engine.sync_host: {host}",
            fix="Name the one under which the servers reach it",
        ) from None
