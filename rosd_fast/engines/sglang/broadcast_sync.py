"""Weight sync by broadcast: buckets from memory, over a process group with each server.

The endpoints are those of SGLang 0.5.23: /begin_weight_update, /update_weights_from_distributed and
/end_weight_update. The layout of a bucket is that of
`model_executor/model_runner_components/weight_updater.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rosd_fast.engines.sglang.client import ServerError
from rosd_fast.engines.sglang.pool import ServerHandle
from rosd_fast.engines.sglang.server_group import ServerGroup, join
from rosd_fast.engines.sglang.weight_sync import WeightSync, post_checked
from rosd_fast.model.weight_stream import BUCKET_BYTES, TensorSpec, WeightStream, read_ahead

NamedTensor = tuple[str, Tensor]


class DistributedSync(WeightSync):
    """Weight sync by broadcast, with NCCL between GPUs and gloo otherwise.

    Servers that wait for the same weights get them in one pass: a bucket is gathered once, and the
    next one while it is sent.

    host: address of this machine that it listens on and at which the servers reach it.
    bucket_bytes: size of one broadcast; trainer and server need as much memory beside the weights.
    """

    def __init__(self, *, host: str = "127.0.0.1", bucket_bytes: int = BUCKET_BYTES) -> None:
        self.host, self.bucket_bytes = host, bucket_bytes
        self._staged: dict[int, WeightStream] = {}
        self._groups: dict[ServerHandle, ServerGroup] = {}
        self._waiting: list[_Receiver] = []
        self._pass: asyncio.Task[None] | None = None

    def stage(self, weights: WeightStream, version: int) -> None:
        self._staged[version] = weights.held()

    async def push(self, handle: ServerHandle, tag: str, version: int) -> None:
        group = self._groups.pop(handle, None)
        if group is not None:
            try:
                await self._send(group, tag, version)
            except ServerError:  # the server may have restarted: join it again
                await group.leave()
            else:
                self._groups[handle] = group
                return
        group = await join(handle, self.host, on_gpu=self._staged[version].on_gpu)
        try:
            await self._send(group, tag, version)
        except ServerError:
            await group.leave()
            raise
        self._groups[handle] = group

    def discard_stale(self) -> None:
        for version in sorted(self._staged)[:-1]:
            del self._staged[version]

    async def close(self) -> None:
        if self._pass is not None:
            self._pass.cancel()
            await asyncio.gather(self._pass, return_exceptions=True)
        await asyncio.gather(*(group.leave() for group in self._groups.values()))
        self._groups.clear()
        self._staged.clear()

    async def _send(self, group: ServerGroup, tag: str, version: int) -> None:
        """Send a version's weights to the server, in the next pass. Raises ServerError."""
        await _begin(group.handle)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Receiver(group, tag, version, done))
        if self._pass is None or self._pass.done():
            self._pass = asyncio.create_task(self._run_passes())
        await done

    async def _run_passes(self) -> None:
        while self._waiting:
            version = self._waiting[0].version
            receivers = [item for item in self._waiting if item.version == version]
            self._waiting = [item for item in self._waiting if item.version != version]
            try:
                await self._run_pass(self._staged[version], receivers)
            except BaseException as error:
                for receiver in (*receivers, *self._waiting):
                    receiver.settle(error)
                self._waiting = []
                raise

    async def _run_pass(self, weights: WeightStream, receivers: Sequence[_Receiver]) -> None:
        """Send all buckets to servers that have begun an update, and end it.

        A server that fails is left out of the rest.
        """
        stack = contextlib.ExitStack()
        device = receivers[0].group.device
        try:
            packed = stack.enter_context(read_ahead(self._packed(weights, device)))
            while (bucket := await asyncio.to_thread(next, packed, None)) is not None:
                left = [receiver for receiver in receivers if not receiver.done.done()]
                if not left:
                    return
                await asyncio.gather(*(receiver.receive(bucket) for receiver in left))
                del bucket
        finally:
            await asyncio.to_thread(stack.close)  # a bucket may still be gathered
        for receiver in receivers:
            receiver.settle(None)

    def _packed(self, weights: WeightStream, device: torch.device) -> Iterator[_Packed]:
        """Buckets of at most `bucket_bytes`, or of one larger tensor, as bytes on a device."""
        before: _Packed | None = None
        for bucket in weights.buckets():
            for part in buckets(list(bucket.items()), self.bucket_bytes):
                if before is not None:
                    yield before
                before = _Packed.of(part, device)
        if before is not None:
            yield replace(before, is_last=True)


@dataclass(frozen=True, slots=True)
class _Packed:
    """Tensors one after the other, as servers receive them.

    specs: by name, in order. flat: the tensors' bytes. is_last: of the version.
    """

    specs: dict[str, TensorSpec]
    flat: Tensor
    is_last: bool = False

    @classmethod
    def of(cls, tensors: Sequence[NamedTensor], device: torch.device) -> _Packed:
        # Large items first, so that they are aligned to their item size.
        ordered = sorted(tensors, key=lambda item: -item[1].itemsize)
        # Parts that transformers has copied, and buffers, are in host memory.
        parts = [tensor.to(device).flatten().view(torch.uint8) for _, tensor in ordered]
        return cls({name: TensorSpec.of(tensor) for name, tensor in ordered}, torch.cat(parts))


@dataclass(frozen=True, slots=True, eq=False)
class _Receiver:
    """A server that gets a version's weights.

    done: set when it has them, or has failed.
    """

    group: ServerGroup
    tag: str
    version: int
    done: asyncio.Future[None]

    async def receive(self, bucket: _Packed) -> None:
        """Send it a bucket."""
        specs = bucket.specs
        body = {
            "names": list(specs),
            "dtypes": [str(spec.dtype).removeprefix("torch.") for spec in specs.values()],
            "shapes": [list(spec.shape) for spec in specs.values()],
            "group_name": self.group.name,
            "load_format": "flattened_bucket",
            # Until the last bucket the server has mixed weights.
            "weight_version": self.tag if bucket.is_last else f"{self.tag}-partial",
            "flush_cache": bucket.is_last,
        }
        handle, path = self.group.handle, "/update_weights_from_distributed"
        try:
            await self.group.broadcast(
                bucket.flat, post_checked(handle, path, body, what="take the weights")
            )
            if bucket.is_last:
                await post_checked(handle, "/end_weight_update", {}, what="end a weight update")
        except ServerError as error:
            self.settle(error)

    def settle(self, error: BaseException | None) -> None:
        """Tell the one that waits, unless it was told or has been cancelled."""
        if self.done.done():
            return
        if error is None:
            self.done.set_result(None)
        elif isinstance(error, asyncio.CancelledError):
            self.done.cancel()
        else:
            self.done.set_exception(error)


async def _begin(handle: ServerHandle) -> None:
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
