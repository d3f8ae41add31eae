"""A vocabulary that is sharded over a process group: each rank's head holds some of its rows.

The methods reduce a row's sums over the ranks. On one rank the sums are complete already, and every
method returns its argument.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rosd_kernels.exchange import exchanged


class Vocabulary:
    """This rank's entries: the ids from `offset` to `offset + local_size`, out of `size`."""

    def __init__(
        self,
        local_size: int,
        group: Any = None,
        device: torch.device | None = None,
        address: int = 0,
    ):
        """Exchange the sizes of the shards, which the ranks of `group` hold in rank order.

        address: of this rank's rows of the head in memory, see exchange.py. With a group this is a
        collective: all of its ranks call it. Raises ValueError where `group` is not a process
        group.
        """
        self.group, self.address = group, address
        self.device = torch.device("cpu") if device is None else device
        self.local_size, self.size, self.largest = local_size, local_size, local_size
        self.rank, self.num_shards, self.offset = 0, 1, 0
        if group is None:
            return
        if not isinstance(group, dist.ProcessGroup):
            raise ValueError(
                f"vocab_group: got {type(group).__name__}, want a torch.distributed process group "
                "that this rank belongs to, or None"
            )
        self.rank, self.num_shards = dist.get_rank(group), dist.get_world_size(group)
        sizes = [size for (size,) in self._exchanged(local_size)]
        self.offset, self.size, self.largest = sum(sizes[: self.rank]), sum(sizes), max(sizes)

    @property
    def is_sharded(self) -> bool:
        return self.group is not None

    def columns(self, ids: Tensor | None) -> Tensor | None:
        """Rows of this rank's head for ids of the whole vocabulary; -1 for another rank's ids."""
        if ids is None or not self.is_sharded:
            return ids
        local = ids - self.offset
        return torch.where((local >= 0) & (local < self.local_size), local, -1)

    def _exchanged(self, *numbers: int) -> list[tuple[int, ...]]:
        return exchanged(numbers, self.group, self.device, self.address)

    def fewest(self, *numbers: int) -> tuple[int, ...]:
        """The minimum of each number over the shards."""
        if not self.is_sharded:
            return numbers
        found = self._exchanged(*numbers)
        return tuple(min(of_ranks) for of_ranks in zip(*found, strict=True))

    def sum_(self, tensor: Tensor) -> Tensor:
        """In-place sum over the shards."""
        if self.is_sharded:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """In-place maximum over the shards."""
        if self.is_sharded:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor

    def logsumexp(self, lse: Tensor) -> Tensor:
        """log sum exp over the shards, elementwise; -inf is an empty shard."""
        if not self.is_sharded:
            return lse
        largest = self.max_(lse.clone())
        return self.sum_((lse - largest).exp_()).log_().add_(largest)

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenate the ranks' tensors, all of one shape, in the last dimension."""
        if not self.is_sharded:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.num_shards)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)
