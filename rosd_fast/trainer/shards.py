"""The student's weights on several ranks: each has its shards, and rank 0 gathers some at a time.

    shards of all ranks -> a bucket on rank 0 -> tensors of files (`FileFrame`) -> files, servers

Rank 0 receives each shard once, in the dtype of the files. It never holds the whole model, unless
it samples with it. Ranks of other copies of the weights have no part in this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from rosd_fast.model.file_frame import FileFrame
from rosd_fast.model.weight_stream import WeightStream

Gather = Callable[[Sequence[str]], Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Shards:
    """This rank's rows of parameters, by name.

    rows: this rank's rows, or the sharded parameters, whose updates are then seen.
    shapes: of the full parameters.
    dtypes: in which they are gathered.
    """

    rows: Mapping[str, Tensor]
    shapes: Mapping[str, torch.Size]
    dtypes: Mapping[str, torch.dtype]

    @classmethod
    def of(cls, model: PreTrainedModel, dtypes: Mapping[str, torch.dtype]) -> Shards:
        """The parameters of a sharded model."""
        parameters = dict(model.named_parameters())
        for name, parameter in parameters.items():
            assert isinstance(parameter, DTensor), name
            assert parameter.placements[-1] == Shard(0), name
        return cls(parameters, {name: p.shape for name, p in parameters.items()}, dtypes)

    def held(self) -> Shards:
        """A copy in host memory, which updates of the model do not change."""
        copies = {
            name: local(rows).to("cpu", self.dtypes[name], copy=True)
            for name, rows in self.rows.items()
        }
        return Shards(copies, self.shapes, self.dtypes)

    def gather(
        self, names: Sequence[str], group: ProcessGroup | None, device: torch.device | str
    ) -> dict[str, Tensor]:
        """The full parameters on rank 0, none elsewhere. A collective of `group`.

        group: the ranks that share rank 0's copy of the weights. A rank that is not among them,
        with None or a group of its own, does nothing. device: that the group sends from.
        """
        if group is None or 0 not in dist.get_process_group_ranks(group):
            return {}
        gathered = {}
        for name in names:
            rows = local(self.rows[name]).to(device, self.dtypes[name])
            tensor = gather_rows(rows, self.shapes[name], group)
            if tensor is not None:
                gathered[name] = tensor
        return gathered


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_rows(rows: Tensor, shape: torch.Size, group: ProcessGroup) -> Tensor | None:
    """The tensor of all ranks' rows on rank 0, None elsewhere. A collective of `group`.

    rows: this rank's, as FSDP deals them: as many on each rank, fewer on the last ones.
    """
    per_rank, size = -(-shape[0] // dist.get_world_size(group)), dist.get_world_size(group)
    if len(rows) < per_rank:
        padded = rows.new_zeros((per_rank, *shape[1:]))
        padded[: len(rows)] = rows
        rows = padded
    sent = rows.contiguous().view(-1).view(torch.uint8)  # not every backend sends every dtype
    if dist.get_rank() != 0:
        dist.gather(sent, None, dst=0, group=group)
        return None
    full = rows.new_empty((size * per_rank, *shape[1:]))
    parts = [part.view(-1).view(torch.uint8) for part in full.split(per_rank)]
    dist.gather(sent, parts, dst=0, group=group)
    return full[: shape[0]]


class ShardedWeights(WeightStream):
    """The weights of a sharded model, on rank 0.

    frame: of the model. gather: returns the full parameters of those names. hold: returns what
    gathers copies of the current ones.
    """

    def __init__(
        self,
        frame: FileFrame,
        gather: Gather,
        *,
        on_gpu: bool,
        hold: Callable[[], Gather] | None = None,
    ) -> None:
        self.frame, self.specs, self.on_gpu = frame, frame.specs, on_gpu
        self._gather, self._hold = gather, hold

    def buckets(self) -> Iterator[dict[str, Tensor]]:
        for bucket in self.frame.buckets:
            yield self.frame.tensors(bucket, self._gather(bucket.parameters))

    def held(self) -> WeightStream:
        """The same values from copies of the shards, which the ranks keep in host memory."""
        if self._hold is None:  # these are copies
            return self
        return ShardedWeights(self.frame, self._hold(), on_gpu=self.on_gpu)
