"""The output head as a shard of the vocabulary: each rank keeps some of its rows, and all compute
on the states of all.

Bytes per rank and micro-batch of N distilled tokens on all ranks together, with weights of b bytes:

    whole head    V H (2 b + 4)   both heads are gathered, the student's gradient is summed in fp32
    its rows      N H (2 b + 4)   both states are gathered, the student's gradient is summed

So rows are cheaper where a micro-batch distils fewer tokens than the vocabulary has entries. They
also save what a whole head takes: V H (2 b + b) for both heads and a gradient. A head that is tied
to the input embeddings has to be whole in any case.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import PreTrainedModel

from rosd_fast.errors import UserError
from rosd_fast.model.head import output_layer
from rosd_fast.types import PackedBatch
from rosd_fast.utils.distributed import World
from rosd_kernels import SpanDivergenceOutput


def check_shardable(model: PreTrainedModel) -> None:
    """Raise UserError for a model whose head cannot be a shard."""
    if output_layer(model).weight is model.get_input_embeddings().weight:
        raise UserError(
            "the model's output head is its input embedding, which each rank needs whole",
            where="parallel.head: shard",
            fix="Leave it out",
        )


def shard_head(model: PreTrainedModel, world: World) -> set[nn.Parameter]:
    """Spread the head of a skeleton over the ranks of a copy, by rows; returns its parameters."""
    mesh, layer = world.mesh, output_layer(model)
    assert mesh is not None
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    for name, parameter in list(layer.named_parameters()):
        rows = distribute_tensor(parameter.detach(), mesh, placements)
        setattr(layer, name, nn.Parameter(rows, requires_grad=parameter.requires_grad))
    return set(layer.parameters())


def average_head_gradients(model: PreTrainedModel, world: World) -> None:
    """Average the head's gradients over the ranks, as FSDP does with all others."""
    for parameter in output_layer(model).parameters():
        if parameter.requires_grad:
            parameter.register_hook(partial(_average, world=world))


def _average(gradient: Any, *, world: World) -> Any:
    """A rank's rows have the gradient of all states of its copy's ranks; copies have others."""
    assert isinstance(gradient, DTensor) and world.mesh is not None
    own = gradient.to_local() / world.size
    if world.mesh.ndim > 1:
        dist.all_reduce(own, group=world.mesh.get_group("replicate"))
    return DTensor.from_local(
        own,
        gradient.device_mesh,
        gradient.placements,
        shape=gradient.shape,
        stride=gradient.stride(),
    )


@dataclass(frozen=True, slots=True)
class GatheredTokens:
    """The distilled tokens of all ranks in a micro-batch, laid out rank after rank."""

    counts: tuple[int, ...]  # of each rank of the group
    group: ProcessGroup

    @classmethod
    def of(cls, batch: PackedBatch, group: ProcessGroup, device: torch.device) -> GatheredTokens:
        """A collective of the group."""
        own = torch.tensor([batch.num_distilled], device=device)
        counts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(counts, own, group=group)
        return cls(tuple(int(count) for count in counts), group)

    @property
    def own(self) -> slice:
        """This rank's rows among all."""
        rank = dist.get_rank(self.group)
        ends = [*accumulate(self.counts)]
        return slice(ends[rank] - self.counts[rank], ends[rank])

    def gather(self, rows: Tensor) -> Tensor:
        """[own N, ...] -> [N of all, ...]; backward each rank gets the gradient of its own."""
        return Gathered.apply(rows, self)  # type: ignore[return-value]

    def batch(self, own: PackedBatch, device: torch.device) -> PackedBatch:
        """What the loss reads of the micro-batches of all."""
        return replace(
            own,
            token_ids=self.gather(own.token_ids.to(device)),
            weights=self.gather(own.weights.to(device)),
            rollout_logprobs=self.gather(own.rollout_logprobs.to(device)),
        )

    def local_part(self, output: SpanDivergenceOutput) -> SpanDivergenceOutput:
        """This rank's part of what all computed, and the whole loss."""
        names = "per_token student_logprob teacher_logprob student_entropy teacher_entropy".split()
        rows = {name: getattr(output, name) for name in names}
        own = {name: None if value is None else value[self.own] for name, value in rows.items()}
        return replace(output, **own)


class Gathered(torch.autograd.Function):
    """Rows of all ranks; padded on their way, as not every backend sends parts of unequal size."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, everyone: GatheredTokens) -> Tensor:
        ctx.own = everyone.own
        padded = rows.new_zeros((max(everyone.counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in everyone.counts]
        dist.all_gather(parts, padded, group=everyone.group)
        return torch.cat([part[:count] for part, count in zip(parts, everyone.counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The loss is the same on all ranks, and so is the whole gradient."""
        return gradients[0][ctx.own], None
