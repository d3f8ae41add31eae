"""The ranks of a run, as torchrun starts them; without torchrun there is one process.

Rank 0 is the controller: only it samples, reads data, logs and writes files other than checkpoints.
The other ranks wait for its calls (`rosd_fast.trainer.ranks`).
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

COMMAND_TIMEOUT = timedelta(days=2)  # longest wait of a worker for rank 0's next call


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process among the ranks of the run.

    rank: of this process.
    size: number of ranks.
    mesh: ("shard",) or ("replicate", "shard"); None on a single process.
    control_group: sends rank 0's calls, on CPUs; its timeout is COMMAND_TIMEOUT.
    checkpoint_group: for the thread that writes checkpoints, on CPUs.
    export_group: for the same thread, the ranks that share rank 0's copy of the weights; None on
        the others.
    """

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    control_group: ProcessGroup | None = None
    checkpoint_group: ProcessGroup | None = None
    export_group: ProcessGroup | None = None

    @property
    def is_rank0(self) -> bool:
        """Whether this process is the controller."""
        return self.rank == 0

    @property
    def shard_group(self) -> ProcessGroup | None:
        """The ranks that share one copy of the weights."""
        return None if self.mesh is None else self.mesh.get_group("shard")

    def scatter(self, values: Sequence[Any] | None, group: ProcessGroup | None = None) -> Any:
        """Send each rank its value; returns this rank's.

        values: one per rank on rank 0, None elsewhere. group: None means `control_group`.
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
        """Send rank 0's value to all ranks; returns it."""
        return self.scatter([value] * self.size if self.is_rank0 else None, group)

    def gather(self, value: Any) -> list[Any] | None:
        """Collect the values of all ranks; returns them by rank on rank 0, None elsewhere."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_rank0 else None
        dist.gather_object(value, values, group=self.control_group)
        return values

    def shutdown_workers(self) -> None:
        """End the other ranks, which wait for rank 0's next call."""
        if self.is_rank0 and self.size > 1:
            self.scatter([None] * self.size)

    @contextmanager
    def shutdown_workers_on_error(self) -> Iterator[None]:
        """End the other ranks if the block raises on rank 0 while they wait for it."""
        try:
            yield
        except BaseException:
            self.shutdown_workers()
            raise

    def sum(self, value: float) -> float:
        """The sum over the ranks."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return float(total)


SINGLE_PROCESS = World()


def launched() -> bool:
    """Whether torchrun has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def open_world(config: ParallelConfig, device: str) -> Iterator[World]:
    """Join torchrun's ranks for the block.

    Raises UserError if the ranks cannot be divided into shard groups, and RunFailed if another rank
    has ended.

    device: auto, cpu or cuda, as in `Config.device`.
    """
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
            export_group=host_group(timedelta(seconds=config.timeout_s), range(shard_size)),
        )
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        raise RunFailed("another rank has ended; its output above says why") from error
    finally:
        dist.destroy_process_group()


def host_group(timeout: timedelta, ranks: Sequence[int] | None = None) -> ProcessGroup | None:
    """A process group for tensors and objects in host memory; None on a rank that is not in it.

    ranks: None: all of them.
    """
    group = dist.new_group(None if ranks is None else [*ranks], backend="gloo", timeout=timeout)
    return group if isinstance(group, ProcessGroup) else None


def pick_device(name: str) -> torch.device:
    """The device that auto, cpu or cuda names; auto: CUDA if present.

    Raises UserError for cuda without a CUDA device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "no CUDA device is available", where="device", fix="Set device to cpu or auto"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def full(tensor: Tensor) -> Tensor:
    """The full tensor. A collective if `tensor` is sharded over ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process has exited."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or "by peer" in text or "gloo" in text


def ignore_stop_signals() -> None:
    """Ignore Ctrl-C and SIGTERM, which reach all ranks: rank 0 handles them and ends the others."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
