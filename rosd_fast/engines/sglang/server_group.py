"""The process group of the trainer and the ranks of one server, over which weights are broadcast.

It is opened beside the trainer's own groups, as SGLang 0.5.23 opens its side: endpoints
/init_weights_update_group and /destroy_weights_update_group.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed
from torch import Tensor

from rosd_fast.engines.sglang.client import ServerError, Unreachable
from rosd_fast.engines.sglang.pool import ServerHandle
from rosd_fast.engines.sglang.weight_sync import post_checked
from rosd_fast.errors import RunFailed, UserError

GROUP_TIMEOUT_S = 120.0  # for joining a group, and for each bucket
LEAVE_TIMEOUT_S = 10.0
BROADCAST_POLL_S = 0.002
T = TypeVar("T")
c10d: Any = torch.distributed  # its stores and groups are not typed


@dataclass(frozen=True, slots=True, eq=False)
class ServerGroup:
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


async def join(handle: ServerHandle, host: str, *, on_gpu: bool) -> ServerGroup:
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
        return ServerGroup(name, handle, await opened, device, store)
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
