"""Vocab-parallel output head: each rank keeps a slice of the vocabulary's rows and evaluates it on
the hidden states of all ranks.

Bytes that a rank receives per micro-batch, for N distilled tokens on all ranks together and weights
of b bytes:

    gathered head   V H (2 b + 4)   both heads, and the student's gradient reduced in fp32
    sharded head    N H (2 b + 4)   both models' states, and the gradient of the student's

So sharding is cheaper if a micro-batch distills fewer tokens than the vocabulary has entries. It
also saves the memory of a gathered head: V H (2 b + b) for both heads and a gradient. A head that
is tied to the input embeddings is needed in full anyway, and is refused.

The scheme is that of Megatron-LM's vocab-parallel cross-entropy (arXiv 1909.08053, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import PreTrainedModel

from rosd_fast.errors import UserError
from rosd_fast.model.head import output_layer
from rosd_fast.types import PackedBatch, PolicyTokens
from rosd_fast.utils.distributed import World
from rosd_fast.utils.transfer import on_device
from rosd_kernels import SpanDivergenceOutput, SpanLogprobOutput

Output = TypeVar("Output", SpanDivergenceOutput, SpanLogprobOutput)
PER_TOKEN = (
    "per_token student_logprob teacher_logprob student_entropy teacher_entropy logprob entropy"
).split()
"""The fields of an output with a row per token."""


def check_shardable(model: PreTrainedModel) -> None:
    """Raise UserError for a model whose head cannot be sharded."""
    if output_layer(model).weight is model.get_input_embeddings().weight:
        raise UserError(
            "the model's output head is its input embedding, which each rank needs in full",
            where="parallel.head: shard",
            fix="Leave it out",
        )


def shard_head(model: PreTrainedModel, world: World) -> set[nn.Parameter]:
    """Shard a skeleton's head by rows over the ranks that share a copy; returns its parameters."""
    mesh, layer = world.mesh, output_layer(model)
    assert mesh is not None
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    for name, parameter in list(layer.named_parameters()):
        rows = distribute_tensor(parameter.detach(), mesh, placements)
        setattr(layer, name, nn.Parameter(rows, requires_grad=parameter.requires_grad))
    return set(layer.parameters())


def average_head_gradients(model: PreTrainedModel, world: World) -> None:
    """Average the head's gradients over the ranks, as FSDP does for all other parameters."""
    for parameter in output_layer(model).parameters():
        if parameter.requires_grad:
            parameter.register_hook(partial(_average, world=world))


def _average(gradient: Any, *, world: World) -> Any:
    """The average over all ranks.

    The gradient of a rank's rows already sums over the ranks of its copy; other copies of the
    weights add theirs.
    """
    assert isinstance(gradient, DTensor) and world.mesh is not None
    local = gradient.to_local() / world.size
    if world.mesh.ndim > 1:
        dist.all_reduce(local, group=world.mesh.get_group("replicate"))
    return DTensor.from_local(
        local,
        gradient.device_mesh,
        gradient.placements,
        shape=gradient.shape,
        stride=gradient.stride(),
    )


@dataclass(frozen=True, slots=True)
class GatheredTokens:
    """The tokens of all ranks that one loss of a micro-batch is computed on, in rank order.

    counts: number of tokens of each rank of the group.
    group: the ranks that share one copy of the weights.
    """

    counts: tuple[int, ...]
    group: ProcessGroup

    @classmethod
    def of(cls, count: int, group: ProcessGroup) -> GatheredTokens:
        """Gather the ranks' numbers of tokens, `count` on this rank. A collective of the group.

        It runs in host memory, which every group of `open_world` has a backend for: the sizes of
        the next tensors depend on it, and reading it from a GPU would wait for all work there.
        """
        local = torch.tensor([count])
        counts = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
        dist.all_gather(counts, local, group=group)
        return cls(tuple(int(each) for each in counts), group)

    @property
    def local_rows(self) -> slice:
        """This rank's tokens among those of all ranks."""
        rank = dist.get_rank(self.group)
        ends = [*accumulate(self.counts)]
        return slice(ends[rank] - self.counts[rank], ends[rank])

    def gather(self, rows: Tensor) -> Tensor:
        """[local N, ...] -> [N of all ranks, ...]; a rank's gradient is that of its own rows."""
        return Gathered.apply(rows, self)  # type: ignore[return-value]

    def batch(self, local: PackedBatch, device: torch.device) -> PackedBatch:
        """`local` with the token ids, weights and log-probabilities of all ranks."""
        return replace(
            local,
            token_ids=self.gather(on_device(local.token_ids, device)),
            weights=self.gather(on_device(local.weights, device)),
            rollout_logprobs=self.gather(on_device(local.rollout_logprobs, device)),
        )

    def policy_tokens(self, local: PolicyTokens, device: torch.device) -> PolicyTokens:
        """`local` with what the loss reads of the tokens of all ranks."""
        names = "token_ids weights advantages is_likelihood rollout_logprobs".split()
        rows = {name: self.gather(on_device(getattr(local, name), device)) for name in names}
        return replace(local, **rows)

    def local_part(self, output: Output) -> Output:
        """Cut the per-token results back to this rank's tokens; the loss stays the total."""
        rows = {name: getattr(output, name, None) for name in PER_TOKEN}
        local = {name: value[self.local_rows] for name, value in rows.items() if value is not None}
        return replace(output, **local)


class Gathered(torch.autograd.Function):
    """All-gather of rows, which are padded because not every backend sends unequal sizes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, tokens: GatheredTokens) -> Tensor:
        ctx.local_rows = tokens.local_rows
        padded = rows.new_zeros((max(tokens.counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in tokens.counts]
        dist.all_gather(parts, padded, group=tokens.group)
        return torch.cat([part[:count] for part, count in zip(parts, tokens.counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """This rank's rows of the gradient, which is the same on all ranks, as the loss is."""
        return gradients[0][ctx.local_rows], None
