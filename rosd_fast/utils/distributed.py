"""The ranks of a run, as torchrun starts them; without torchrun there is one.

Rank 0 leads: it alone samples, reads, writes and logs. What all ranks do together it orders, and
the others follow (`rosd_fast.trainer.ranks`).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from rosd_fast.config import ParallelConfig
from rosd_fast.errors import RunFailed, UserError

COMMAND_TIMEOUT = timedelta(days=2)  # that followers wait for an order


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process among the ranks of the run."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None  # ("shard",) or ("replicate", "shard"); None: one rank
    control_group: ProcessGroup | None = None  # on CPUs, waits as long as a step takes
    checkpoint_group: ProcessGroup | None = None  # on CPUs, for checkpoints, which a thread writes

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    @property
    def shard_group(self) -> ProcessGroup | None:
        """The ranks that share one copy of the weights."""
        return None if self.mesh is None else self.mesh.get_group("shard")

    def scatter(self, values: Sequence[Any] | None, group: ProcessGroup | None = None) -> Any:
        """To each rank its value; rank 0 gives them all, the others None.

        group: None, `control_group`.
        """
        if self.size == 1:
            assert values is not None
            return values[0]
        received: list[Any] = [None]
        dist.scatter_object_list(
            received, list(values) if values else None, group=group or self.control_group
        )
        return received[0]

    def broadcast(self, value: Any, group: ProcessGroup | None = None) -> Any:
        """Rank 0's value."""
        return self.scatter([value] * self.size if self.is_rank0 else None, group)

    def gather(self, value: Any) -> list[Any] | None:
        """On rank 0 the values by rank, None elsewhere."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_rank0 else None
        dist.gather_object(value, values, group=self.control_group)
        return values

    def shutdown_workers(self) -> None:
        """Let the other ranks end, where they wait for rank 0's word."""
        if self.is_rank0 and self.size > 1:
            self.scatter([None] * self.size)

    @contextmanager
    def shutdown_workers_on_error(self) -> Iterator[None]:
        """Let the other ranks end, too, where rank 0 fails in what they wait for."""
        try:
            yield
        except BaseException:
            self.shutdown_workers()
            raise

    def sum(self, value: float) -> float:
        """Over the ranks."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return float(total)


SINGLE_PROCESS = World()


def launched() -> bool:
    """Whether torchrun has started this process, as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def open_world(config: ParallelConfig, device: str) -> Iterator[World]:
    """Join torchrun's ranks. device: auto, cpu or cuda, as in `Config.device`."""
    if not launched():
        yield SINGLE_PROCESS
        return
    size = int(os.environ["WORLD_SIZE"])
    shard_size = config.shard_size or size
    if size % shard_size:
        raise UserError(
            f"{size} ranks cannot be divided into groups of {shard_size}",
            where="parallel.shard_size",
            fix="Give a divisor of the number of ranks",
        )
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(seconds=config.timeout_s)
    )
    try:
        yield World(
            rank=dist.get_rank(),
            size=size,
            mesh=init_device_mesh(
                "cuda" if on_gpu else "cpu",
                (size,) if shard_size == size else (size // shard_size, shard_size),
                mesh_dim_names=("shard",) if shard_size == size else ("replicate", "shard"),
            ),
            control_group=host_group(COMMAND_TIMEOUT),
            checkpoint_group=host_group(timedelta(seconds=config.timeout_s)),
        )
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        raise RunFailed("another rank has ended; what it wrote above says why") from error
    finally:
        dist.destroy_process_group()


def host_group(timeout: timedelta) -> ProcessGroup:
    """Of all ranks, for what lies in host memory."""
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, ProcessGroup)
    return group


def pick_device(name: str) -> torch.device:
    """auto: CUDA where present."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "no CUDA device is available", where="device", fix="Set device to cpu or auto"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be spread over ranks. A collective where it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed since another process has gone."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or "by peer" in text or "gloo" in text


def ignore_stop_signals() -> None:
    """Ctrl-C and SIGTERM reach all ranks; rank 0 acts on them, and ends the others."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
